"""`norm_project` by fused Triton kernels; the products of its backward are the library's."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hycam_kernels.backends.triton.modulation import DTYPES, environment_refusal, launcher
from hycam_kernels.folding import fold_weights, low_rank_gradients
from hycam_kernels.inputs import NORM_DIFFERENTIABLE, NormProjectInputs, NormSaved, finish

if TYPE_CHECKING:
    from hycam_kernels.backends.triton.launch import Launcher

# products of 16-bit types want rows that are multiples of 16 bytes
_ALIGNMENT = 8


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


def forward(x: NormProjectInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h [T, d], V [T, E r], logits [T, E], and the statistics mu (0 elements for an RMSNorm) and rho [T]."""
    with torch.cuda.device_of(x.hidden_in):
        return run_forward(x, launcher(x.hidden_in.device))


def backward(
    grad_hidden: Tensor | None,
    grad_v: Tensor | None,
    grad_logits: Tensor | None,
    x: NormProjectInputs,
    saved: NormSaved,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the tensors in `NORM_DIFFERENTIABLE`, each in its tensor's dtype; 0 elements where not needed."""
    with torch.cuda.device_of(x.hidden_in):
        return run_backward(grad_hidden, grad_v, grad_logits, x, saved, needs, launcher(x.hidden_in.device))


def run_forward(x: NormProjectInputs, launch: "Launcher") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`forward` by a given launcher."""
    from hycam_kernels.backends.triton.kernels.norm_projection import norm_projection

    return norm_projection(launch, x, _projection(x))


def run_backward(
    grad_hidden: Tensor | None,
    grad_v: Tensor | None,
    grad_logits: Tensor | None,
    x: NormProjectInputs,
    saved: NormSaved,
    needs: list[bool],
    launch: "Launcher",
) -> list[Tensor]:
    """`backward` by a given launcher."""
    from hycam_kernels.backends.triton.kernels.norm_projection import norm_backward
    from hycam_kernels.backends.triton.kernels.router_weight_grad import router_weight_grad

    need = dict(zip(NORM_DIFFERENTIABLE, needs, strict=True))
    grads: dict[str, Tensor] = {}
    d_rows = None if grad_v is None and grad_logits is None else _row_gradients(x, grad_v, grad_logits)
    if need["hidden_in"] or need["norm_weight"] or need["norm_bias"]:
        gradient = _hidden_gradient(x, grad_hidden, d_rows)
        if gradient is not None and gradient.shape[0]:
            grads |= norm_backward(launch, x, gradient, saved.mean, saved.rstd, need)
    operand = saved.hidden.to(x.compute_dtype)
    if grad_v is not None:
        grads |= low_rank_gradients(grad_v, x, operand, need)
    if grad_logits is not None and need["router_weight"]:
        grads["router_weight"] = router_weight_grad(launch, x, grad_logits, operand)
    return [finish(getattr(x, name), grads.get(name), needed) for name, needed in need.items()]


def _projection(x: NormProjectInputs) -> Tensor:
    """[M | W_r], [E r + E, d] with rows of zeros up to the alignment, in the compute dtype."""
    low_rank, count = x.num_experts * x.rank, x.num_experts
    rows = -(-(low_rank + count) // _ALIGNMENT) * _ALIGNMENT
    projection = torch.zeros(rows, x.shape[1], dtype=x.compute_dtype, device=x.hidden_in.device)
    projection[:low_rank] = fold_weights(x.lora_n, x.lora_a, x.compute_dtype)
    projection[low_rank : low_rank + count] = x.router_weight
    return projection


def _row_gradients(x: NormProjectInputs, grad_v: Tensor | None, grad_logits: Tensor | None) -> Tensor:
    """Gradients of V and the logits side by side, as `_projection` has its rows."""
    low_rank, count = x.num_experts * x.rank, x.num_experts
    columns = -(-(low_rank + count) // _ALIGNMENT) * _ALIGNMENT
    d_rows = torch.zeros(x.shape[0], columns, dtype=x.compute_dtype, device=x.hidden_in.device)
    if grad_v is not None:
        d_rows[:, :low_rank] = grad_v
    if grad_logits is not None:
        d_rows[:, low_rank : low_rank + count] = grad_logits
    return d_rows


def _hidden_gradient(x: NormProjectInputs, grad_hidden: Tensor | None, d_rows: Tensor | None) -> Tensor | None:
    """The whole gradient of h, through all three results; rows dense. None where none of them has one."""
    if d_rows is None:
        if grad_hidden is None or x.shape[1] == 1 or grad_hidden.stride(-1) == 1:
            return grad_hidden
        return grad_hidden.contiguous()
    if grad_hidden is None:
        return d_rows @ _projection(x)
    if grad_hidden.dtype == x.compute_dtype:
        return torch.addmm(grad_hidden, d_rows, _projection(x))
    return grad_hidden + d_rows @ _projection(x)
