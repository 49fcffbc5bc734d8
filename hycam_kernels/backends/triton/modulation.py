"""The op by fused Triton kernels: what CUDA users run.

The large products S = h W_s^T, V = h M^T and those of the weight gradients are the library's; the kernels make
everything between them in one pass each (see `kernels`). The forward keeps S, V, p and the logits; with recomputation
neither S nor V.

triton is imported by the first call, so that a machine without it can import this module and be told why.
"""

import functools
import os
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hycam_kernels.folding import aligned_rows, fold, fold_router, has_bias, unfold_grads
from hycam_kernels.inputs import DIFFERENTIABLE, ModulationInputs, Saved, finish

if TYPE_CHECKING:
    from hycam_kernels.backends.triton.launch import Launcher

# the oldest triton whose language the kernels keep to
OLDEST_TRITON = (3, 6)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_EXPERTS = 64
# up to so many tokens without gradients are decoding: bound by reading the weights
MAX_DECODE_TOKENS = 64


def refusal(x: ModulationInputs) -> str | None:
    """Why this backend can't run the call; None where it can."""
    return environment_refusal(x.hidden, x.backend, "hidden") or _argument_refusal(x)


def environment_refusal(tensor: Tensor, backend: str, name: str) -> str | None:
    """Why no kernel can run where the tensor of this name is; None where one can."""
    on_cuda = tensor.device.type == "cuda"
    if not on_cuda and not (backend == "triton" and _interpreting()):
        return f"{name} is on {tensor.device}: it needs a CUDA device, or TRITON_INTERPRET=1 before triton's import"
    reason = _installation_refusal()
    if reason is None and on_cuda and not _interpreting():
        reason = _device_refusal(tensor.device.index)
    return reason


def _argument_refusal(x: ModulationInputs) -> str | None:
    if x.expert_weight is not None:
        return "expert_weight: full-rank experts are library products, which the torch backend runs"
    if x.compute_dtype not in DTYPES:
        return f"products in {x.compute_dtype}: it has bfloat16, float16 and float32"
    if x.num_experts > MAX_EXPERTS:
        return f"{x.num_experts} experts: a token's routing must fit {MAX_EXPERTS} lanes"
    for name in ("hidden", "attn_output", "residual"):
        tensor = getattr(x, name)
        if tensor is None:
            continue
        if tensor.dtype == torch.float64:
            return f"{name} is float64"
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name} has a last stride of {tensor.stride(-1)}: rows must be dense"
    return None


# torch.compile takes what the next three return as constants
@torch.compiler.assume_constant_result
def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def _installation_refusal() -> str | None:
    version = _triton_version()
    if version is None:
        return "triton is not installed"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {version} is installed: it needs {'.'.join(map(str, OLDEST_TRITON))} or later"
    return None


@torch.compiler.assume_constant_result
def _device_refusal(index: int) -> str | None:
    return None if _family(index) else f"{torch.cuda.get_device_name(index)}: no configurations are shipped for it"


@functools.cache
def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


@functools.cache
def _family(index: int) -> str | None:
    from hycam_kernels.backends.triton.config_tables import family_of

    return family_of(torch.device("cuda", index))


@functools.cache
def launcher(device: torch.device) -> "Launcher":
    from hycam_kernels.backends.triton.config_tables import INTERPRETER
    from hycam_kernels.backends.triton.launch import Launcher

    if _interpreting():
        return Launcher(INTERPRETER, inline_assembly=False)
    family = _family(device.index)
    assert family is not None
    return Launcher(family, inline_assembly=family.startswith("sm_"))


def decodes(x: ModulationInputs) -> bool:
    """Whether `decode` takes the call in place of `forward`."""
    # with V and the logits given, most of what those kernels join into two launches is done
    few = 0 < x.shape[0] <= MAX_DECODE_TOKENS and x.given_v is None
    return x.backend == "triton" and not x.needs_grad and few


def decode(x: ModulationInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h_out [T, d], load [E], router_prob [E] and the balance loss, a scalar, in two launches at most."""
    from hycam_kernels.backends.triton.kernels.decode import decode_forward

    with torch.cuda.device_of(x.hidden):
        return decode_forward(launcher(x.hidden.device), x)


def forward(x: ModulationInputs, launch: "Launcher | None" = None) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """h_out [T, d], load [E], router_prob [E] and what the backward needs; by the device's launcher, or a given one."""
    from hycam_kernels.backends.triton.kernels.fusion_forward import fusion_forward
    from hycam_kernels.backends.triton.kernels.product_forward import product_forward
    from hycam_kernels.backends.triton.kernels.router import route

    launch = launch or launcher(x.hidden.device)
    x = _dense_weights(x)
    hidden = x.hidden.to(x.compute_dtype)
    # triton launches on the current device, which needn't be hidden's
    with torch.cuda.device_of(x.hidden):
        v = _folded_product(x, hidden)
        logits, probs, load, router_prob = route(launch, x, hidden)
        of_experts = v, _cast(x, x.lora_b), _used_weights(x, probs)
        if x.shared_weight is not None and launch.takes("product_forward", x):
            out, s = product_forward(launch, x, hidden, *of_experts)
        else:
            s = _shared_product(x, hidden)
            out = fusion_forward(launch, x, s, *of_experts)
    saved = Saved(
        s if x.keep and s is not None else hidden.new_empty(0),
        v if x.keep and v is not None and x.given_v is None else hidden.new_empty(0),
        probs,
        logits if x.given_logits is None else probs.new_empty(0),
    )
    return out, load, router_prob, saved


def backward(
    grad_out: Tensor | None,
    grad_load: Tensor | None,
    grad_router_prob: Tensor | None,
    x: ModulationInputs,
    saved: Saved,
    needs: list[bool],
    launch: "Launcher | None" = None,
) -> list[Tensor]:
    """Gradients of the tensors in `DIFFERENTIABLE`, each in its tensor's dtype; 0 elements where ``needs`` is false."""
    launch = launch or launcher(x.hidden.device)
    need = dict(zip(DIFFERENTIABLE, needs, strict=True))
    with torch.cuda.device_of(x.hidden):
        grads = _gradients(launch, _dense_weights(x), saved, need, grad_out, grad_load, grad_router_prob)
    return [finish(x, name, grads.get(name), needed) for name, needed in need.items()]


class _OfProducts(NamedTuple):
    """Gradients of what the library's products made of h, in the compute dtype; of the logits in float32.

    ``rows`` [T, `aligned_rows`] has those of V and the logits side by side and zeros beyond, where one product takes
    them to h.
    """

    s: Tensor | None
    v: Tensor | None
    logits: Tensor | None
    rows: Tensor | None


_FOLDED = ("lora_a", "lora_n", "lora_a_bias", "lora_n_bias")


def _gradients(
    launch: "Launcher",
    x: ModulationInputs,
    saved: Saved,
    need: dict[str, bool],
    grad_out: Tensor | None,
    grad_load: Tensor | None,
    grad_router_prob: Tensor | None,
) -> dict[str, Tensor | None]:
    hidden = x.hidden.to(x.compute_dtype)
    grads, upstream = _by_kernels(launch, x, hidden, saved, need, grad_out, grad_load, grad_router_prob)
    return grads | _by_products(x, hidden, upstream, need)


def _by_kernels(
    launch: "Launcher",
    x: ModulationInputs,
    hidden: Tensor,
    saved: Saved,
    need: dict[str, bool],
    grad_out: Tensor | None,
    grad_load: Tensor | None,
    grad_router_prob: Tensor | None,
) -> tuple[dict[str, Tensor | None], _OfProducts]:
    """Gradients of the streams, of B and of the router; and those from which products make the rest."""
    from hycam_kernels.backends.triton.kernels.fusion_backward import FusionBackward
    from hycam_kernels.backends.triton.kernels.router import route_backward
    from hycam_kernels.backends.triton.kernels.router_weight_grad import router_weight_grad
    from hycam_kernels.backends.triton.kernels.sum_parts import sum_parts

    grads: dict[str, Tensor | None] = {}
    # parts that splits made, and their sum: one launch adds all of them
    sums: list[tuple[Tensor, Tensor]] = []
    d_s = d_v = d_logits = d_rows = d_logit_columns = partial_d_probs = partial_d_v = None

    if grad_out is not None:
        s = saved.s if saved.s.numel() else _shared_product(x, hidden)
        v = saved.v if saved.v.numel() else _folded_product(x, hidden)
        if grad_out.shape[-1] > 1 and grad_out.stride(-1) != 1:
            grad_out = grad_out.contiguous()
        fusion = FusionBackward(launch, x, grad_out, s, v, _cast(x, x.lora_b), _used_weights(x, saved.probs))
        streams = {"attn": need["attn_output"], "residual": need["residual"]}
        of_folded = any(need[name] for name in _FOLDED)
        v_wanted = v is not None and (need["given_v"] or of_folded or (need["hidden"] and x.given_v is None))
        if v_wanted and launch.takes("row_grad", x):
            grads["attn_output"], grads["residual"], d_s, partial_d_probs, partial_d_v = fusion.stream_and_v(**streams)
        else:
            grads["attn_output"], grads["residual"], d_s, partial_d_probs = fusion.stream(**streams)
            partial_d_v = fusion.v() if v_wanted else None
        if partial_d_v is not None:
            low_rank = x.num_experts * x.rank
            if x.given_v is None:
                d_rows = hidden.new_empty(hidden.shape[0], aligned_rows(x))
                d_v, d_logit_columns = d_rows[:, :low_rank], d_rows[:, low_rank:]
            else:
                d_v = grads["given_v"] = hidden.new_empty(hidden.shape[0], low_rank)
            sums.append((partial_d_v, d_v))
        if x.lora_b is not None and (need["lora_b"] or need["lora_b_bias"]):
            partial_d_b, grads["lora_b_bias"] = fusion.b()
            d_b = grads["lora_b"] = torch.empty_like(x.lora_b)
            sums.append((partial_d_b, d_b))

    if x.num_experts:
        logits = saved.logits if x.given_logits is None else x.given_logits
        upstream = partial_d_probs, grad_load, grad_router_prob
        d_logits = route_backward(launch, x, saved.probs, logits, *upstream, d_logit_columns)
        grads["given_logits"] = d_logits
        if need["router_bias"]:
            grads["router_bias"] = d_logits.sum(0)
        if x.router_weight is not None and need["router_weight"]:
            d_weight = grads["router_weight"] = torch.empty_like(x.router_weight)
            sums.append((router_weight_grad(launch, x, d_logits, hidden), d_weight))
    sum_parts(launch, x, sums)
    return grads, _OfProducts(d_s, d_v, d_logits, d_rows)


def _by_products(
    x: ModulationInputs, hidden: Tensor, upstream: _OfProducts, need: dict[str, bool]
) -> dict[str, Tensor | None]:
    """Gradients of h, W_shared, A, N and their biases."""
    grads: dict[str, Tensor | None] = {}
    # (gradient of a product with h, the product's weight): each gives a share of h's gradient
    products: list[tuple[Tensor, Tensor]] = []
    d_s, d_v, d_logits, d_rows = upstream
    if d_s is not None and x.shared_weight is not None:
        products.append((d_s, x.shared_weight.to(x.compute_dtype)))
        if need["shared_weight"]:
            grads["shared_weight"] = _weight_grad(d_s, hidden, x.shared_weight.dtype)
        if need["shared_bias"]:
            grads["shared_bias"] = d_s.sum(0, dtype=torch.float32)
    if d_v is not None and x.lora_a is not None and any(need[name] for name in _FOLDED):
        d_bias = d_v.sum(0, dtype=torch.float32) if has_bias(x) else None
        grads |= unfold_grads(x, _weight_grad(d_v, hidden, x.lora_a.dtype), d_bias, need)
    if need["hidden"]:
        if d_rows is not None:
            products.append((d_rows, fold_router(x)))
        elif d_logits is not None and x.router_weight is not None:
            products.append((d_logits.to(x.compute_dtype), x.router_weight.to(x.compute_dtype)))
        grads["hidden"] = _sum_of_products(products)
    return grads


_READ_BY_ELEMENT = ("shared_bias", "lora_b", "lora_b_bias", "router_weight", "router_bias")


def _dense_weights(x: ModulationInputs) -> ModulationInputs:
    """The call with the small tensors that kernels read by element in row-major order."""
    dense = {name: getattr(x, name) for name in _READ_BY_ELEMENT}
    return x._replace(**{name: tensor.contiguous() for name, tensor in dense.items() if tensor is not None})


def _cast(x: ModulationInputs, weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.to(x.compute_dtype)


def _shared_product(x: ModulationInputs, hidden: Tensor) -> Tensor | None:
    """S = h W_shared^T + bias."""
    if x.shared_weight is None:
        return None
    return F.linear(hidden, x.shared_weight.to(x.compute_dtype), _cast(x, x.shared_bias))


def _folded_product(x: ModulationInputs, hidden: Tensor) -> Tensor | None:
    """V = h M^T + bias, [T, E r], unless it was given; None without experts."""
    if x.given_v is not None:
        return x.given_v
    return None if x.lora_a is None else F.linear(hidden, *fold(x))


def _used_weights(x: ModulationInputs, probs: Tensor) -> Tensor:
    """p as the output uses it: soft, or one-hot at the first largest entry, but NaN where p is."""
    if not (x.hard and x.num_experts):
        return probs
    return torch.zeros_like(probs).scatter_(1, probs.argmax(-1, keepdim=True), 1) + (probs - probs)


def _weight_grad(d_output: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight's gradient, unrounded where the weight is float32: NVIDIA's library writes the product so."""
    writes_float32 = hidden.device.type != "cpu" and torch.version.hip is None
    if dtype == torch.float32 and hidden.dtype != dtype and writes_float32:
        return torch.mm(d_output.T, hidden, out_dtype=torch.float32)
    return d_output.T @ hidden


def _sum_of_products(products: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    total = None
    # the largest comes last: it reads what it adds to while it computes
    for d_output, weight in sorted(products, key=lambda product: product[1].shape[0]):
        total = d_output @ weight if total is None else total.addmm_(d_output, weight)
    return total
