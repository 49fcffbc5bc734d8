"""`norm_project` by fused Triton kernels; the products of its backward are the library's."""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hycam_kernels.backends.norm_gradients import Parts, norm_gradients
from hycam_kernels.backends.triton.modulation import DTYPES, environment_refusal, launcher
from hycam_kernels.folding import aligned_rows, fold_router
from hycam_kernels.inputs import NormProjectInputs, NormSaved, NormUpstream

if TYPE_CHECKING:
    from hycam_kernels.backends.triton.launch import Launcher


def refusal(x: NormProjectInputs) -> str | None:
    """Why this backend can't run the call; None where it can."""
    return environment_refusal(x.hidden_in, x.backend, "hidden_in") or _argument_refusal(x)


def _argument_refusal(x: NormProjectInputs) -> str | None:
    if x.compute_dtype not in DTYPES:
        return f"products in {x.compute_dtype}: it has bfloat16, float16 and float32"
    if x.norm_dtype == torch.float64:
        return "hidden_in or norm_weight is float64"
    if x.shape[1] > 1 and x.hidden_in.stride(-1) != 1:
        return f"hidden_in has a last stride of {x.hidden_in.stride(-1)}: rows must be dense"
    return None


def forward(x: NormProjectInputs, launch: "Launcher | None" = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h [T, d], V [T, E r], logits [T, E], and the statistics mu (0 elements for an RMSNorm) and rho [T].

    By the device's launcher, or a given one.
    """
    from hycam_kernels.backends.triton.kernels.norm_projection import norm_projection

    with torch.cuda.device_of(x.hidden_in):
        return norm_projection(launch or launcher(x.hidden_in.device), x, fold_router(x))


def backward(
    upstream: NormUpstream,
    x: NormProjectInputs,
    saved: NormSaved,
    needs: list[bool],
    launch: "Launcher | None" = None,
) -> list[Tensor]:
    """Gradients of the tensors in `NORM_DIFFERENTIABLE`, as `norm_gradients` returns them."""
    launch = launch or launcher(x.hidden_in.device)
    parts = Parts(_hidden_gradient, partial(_norm_gradients, launch), partial(_router_weight_gradient, launch))
    with torch.cuda.device_of(x.hidden_in):
        return norm_gradients(upstream, x, saved, needs, parts)


def _norm_gradients(
    launch: "Launcher", gradient: Tensor, x: NormProjectInputs, saved: NormSaved, need: dict[str, bool]
) -> dict[str, Tensor]:
    from hycam_kernels.backends.triton.kernels.norm_projection import norm_backward

    return norm_backward(launch, x, gradient, saved.mean, saved.rstd, need) if gradient.shape[0] else {}


def _router_weight_gradient(launch: "Launcher", grad_logits: Tensor, operand: Tensor, x: NormProjectInputs) -> Tensor:
    from hycam_kernels.backends.triton.kernels.router_weight_grad import router_weight_grad
    from hycam_kernels.backends.triton.kernels.sum_parts import sum_parts

    parts = router_weight_grad(launch, x, grad_logits, operand)
    total = torch.empty_like(parts[0])
    sum_parts(launch, x, [(parts, total)])
    return total


def _row_gradients(x: NormProjectInputs, upstream: NormUpstream) -> Tensor:
    """Gradients of V and the logits side by side, as `fold_router` has its rows."""
    low_rank, count = x.num_experts * x.rank, x.num_experts
    d_rows = torch.zeros(x.shape[0], aligned_rows(x), dtype=x.compute_dtype, device=x.hidden_in.device)
    if upstream.v is not None:
        d_rows[:, :low_rank] = upstream.v
    if upstream.logits is not None:
        d_rows[:, low_rank : low_rank + count] = upstream.logits
    return d_rows


def _hidden_gradient(upstream: NormUpstream, x: NormProjectInputs) -> Tensor | None:
    """The whole gradient of h, through all three results; rows dense. None where none of them has one."""
    grad_hidden = upstream.hidden
    if upstream.v is None and upstream.logits is None:
        if grad_hidden is None or x.shape[1] == 1 or grad_hidden.stride(-1) == 1:
            return grad_hidden
        return grad_hidden.contiguous()
    d_rows = _row_gradients(x, upstream)
    if grad_hidden is None:
        return d_rows @ fold_router(x)
    if grad_hidden.dtype == x.compute_dtype:
        return torch.addmm(grad_hidden, d_rows, fold_router(x))
    return grad_hidden + d_rows @ fold_router(x)
