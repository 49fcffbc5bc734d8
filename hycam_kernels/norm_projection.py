"""`norm_project`: the layer's input norm with the low-rank projections and router logits, as `torch.library` ops."""

import torch
from torch import Tensor

from hycam_kernels.backends.torch import norm_projection as norm_torch_backend
from hycam_kernels.backends.triton import norm_projection as norm_triton_backend
from hycam_kernels.checks import check_norm_arguments
from hycam_kernels.inputs import NORM_DIFFERENTIABLE, NormProjectInputs, NormSaved, NormUpstream, empty_gradients
from hycam_kernels.output import NormProjectOutput
from hycam_kernels.preparation import compute_dtype


def norm_project(
    hidden_in: Tensor,
    norm_weight: Tensor,
    lora_a: Tensor,
    lora_n: Tensor,
    router_weight: Tensor,
    *,
    norm_bias: Tensor | None = None,
    eps: float,
    kind: str = "rms",
    backend: str = "auto",
) -> NormProjectOutput:
    r"""The normalised input with its low-rank projections and router logits in one pass.

    .. math::
        h = \mathrm{Norm}(h_{in}),\quad V_k = h (N_k A_k)^T,\quad \ell = h W_r^T

    with an RMSNorm, :math:`h = w \odot h_{in} / \sqrt{\mathrm{mean}(h_{in}^2) + \epsilon}`, or a LayerNorm,
    :math:`h = w \odot (h_{in} - \mu) / \sqrt{\mathrm{var}(h_{in}) + \epsilon} + b`. T tokens in the leading dimensions
    (any number of them, T = 0 too), d features, E experts, rank r. Differentiable in every tensor; beside its arguments
    and h the backward keeps one (RMSNorm) or two (LayerNorm) numbers a token.

    Args:
        hidden_in: [..., d] the layer's input. A row-strided one is read in place where the leading dimensions
            collapse to one stride.
        norm_weight: [d] w.
        lora_a: [E, r, d].
        lora_n: [E, r, r].
        router_weight: [E, d].
        norm_bias: [d] b, or None; a LayerNorm's only.
        eps: added to the mean square or the variance, 0 or more.
        kind: "rms" or "layer".
        backend: "auto", "torch" or "triton", as in `hycam_modulation`.

    Returns:
        `NormProjectOutput`: hidden [..., d], v [..., E, r], logits [..., E].

    dtypes: hidden has the dtype of ``norm_weight * hidden_in``. Statistics are float32 (float64 where that is float64).
    An RMSNorm is rounded to hidden_in's dtype before it is multiplied by the weight, as in transformers' Llama; a
    LayerNorm is rounded once, as in torch. The projections run in autocast's dtype where autocast is on, else in
    hidden's, from hidden and weights cast to it; autocast doesn't touch the norm. v has that dtype, logits are float32
    (float64 for float64). Each gradient has the dtype of its tensor.

    Raises:
        TypeError: an argument that isn't a float tensor.
        ValueError: a shape, a device mismatch, a ``norm_bias`` with ``kind="rms"``, a negative or infinite ``eps``, an
            unknown ``kind`` or ``backend``.
        RuntimeError: ``backend="triton"`` where it can't run, with the reason; a second-order gradient.
    """
    tensors = {
        "hidden_in": hidden_in,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "lora_a": lora_a,
        "lora_n": lora_n,
        "router_weight": router_weight,
    }
    check_norm_arguments(tensors, eps=eps, kind=kind, backend=backend)
    call = NormProjectInputs(
        hidden_in.reshape(-1, hidden_in.shape[-1]),
        norm_weight,
        norm_bias,
        lora_a,
        lora_n,
        router_weight,
        eps=float(eps),
        kind=kind,
        compute_dtype=compute_dtype(torch.promote_types(hidden_in.dtype, norm_weight.dtype), hidden_in.device),
        backend=backend,
    )
    if call.backend == "auto":
        call = call._replace(backend="torch" if _triton_refusal(call) else "triton")
    elif call.backend == "triton" and (refusal := _triton_refusal(call)):
        raise RuntimeError(f"norm_project: backend='triton' can't run this call: {refusal}")
    hidden, v, logits, *_ = torch.ops.hycam.norm_project(*call)
    leading = hidden_in.shape[:-1]
    return NormProjectOutput(
        hidden.view(hidden_in.shape), v.view(*leading, *lora_a.shape[:2]), logits.view(*leading, call.num_experts)
    )


def _triton_refusal(call: NormProjectInputs) -> str | None:
    """Why the triton backend can't run the call; None where it can."""
    return norm_triton_backend.refusal(call)


_library = torch.library.Library("hycam", "FRAGMENT")
_INPUT_SCHEMA = (
    "Tensor hidden_in, Tensor norm_weight, Tensor? norm_bias, Tensor lora_a, Tensor lora_n, Tensor router_weight, "
    "float eps, str kind, ScalarType compute_dtype, str backend"
)
_GRAD_SCHEMA = "Tensor? grad_hidden, Tensor? grad_v, Tensor? grad_logits"
_SAVED_SCHEMA = ", ".join(f"Tensor {name}" for name in NormSaved._fields)
_library.define(f"norm_project({_INPUT_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_library.define(f"norm_project_backward({_GRAD_SCHEMA}, {_INPUT_SCHEMA}, {_SAVED_SCHEMA}, bool[] needs) -> Tensor[]")


def _backend(inputs: NormProjectInputs):
    return norm_triton_backend if inputs.backend == "triton" else norm_torch_backend


@torch.library.impl("hycam::norm_project", "CompositeExplicitAutograd", lib=_library)
def _norm_project(*args) -> tuple[Tensor, ...]:
    inputs = NormProjectInputs(*args)
    with torch.autocast(inputs.hidden_in.device.type, enabled=False):
        return _backend(inputs).forward(inputs)


@torch.library.impl("hycam::norm_project_backward", "CompositeExplicitAutograd", lib=_library)
def _norm_project_backward(grad_hidden, grad_v, grad_logits, *args) -> list[Tensor]:
    inputs, saved, needs = _split_backward_args(args)
    with torch.autocast(inputs.hidden_in.device.type, enabled=False):
        return _backend(inputs).backward(NormUpstream(grad_hidden, grad_v, grad_logits), inputs, saved, needs)


def _split_backward_args(args: tuple) -> tuple[NormProjectInputs, NormSaved, list[bool]]:
    at = len(NormProjectInputs._fields)
    return NormProjectInputs(*args[:at]), NormSaved(*args[at:-1]), args[-1]


@torch.library.register_fake("hycam::norm_project", lib=_library)
def _norm_project_fake(*args) -> tuple[Tensor, ...]:
    x = NormProjectInputs(*args)
    tokens = x.hidden_in.shape[0]

    def empty(*shape, dtype: torch.dtype) -> Tensor:
        return x.hidden_in.new_empty(shape, dtype=dtype)

    return (
        empty(*x.hidden_in.shape, dtype=x.hidden_dtype),
        empty(tokens, x.num_experts * x.rank, dtype=x.compute_dtype),
        empty(tokens, x.num_experts, dtype=x.sum_dtype),
        empty(tokens if x.kind == "layer" else 0, dtype=x.norm_dtype),
        empty(tokens, dtype=x.norm_dtype),
    )


@torch.library.register_fake("hycam::norm_project_backward", lib=_library)
def _norm_project_backward_fake(grad_hidden, grad_v, grad_logits, *args) -> list[Tensor]:
    inputs, _, needs = _split_backward_args(args)
    return empty_gradients(inputs, NORM_DIFFERENTIABLE, needs)


def _setup_context(ctx, inputs, output) -> None:
    hidden, _, _, mean, rstd = output
    count = len(NORM_DIFFERENTIABLE)
    ctx.save_for_backward(*inputs[:count], hidden, mean, rstd)
    ctx.options = inputs[count:]
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, grad_hidden, grad_v, grad_logits, *_):
    count = len(NORM_DIFFERENTIABLE)
    kept = ctx.saved_tensors  # read once: non-reentrant checkpointing refuses to unpack a tensor twice
    tensors, saved = kept[:count], kept[count:]
    needs = list(ctx.needs_input_grad[:count])
    grads = torch.ops.hycam.norm_project_backward(
        grad_hidden, grad_v, grad_logits, *tensors, *ctx.options, *saved, needs
    )
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * len(ctx.options)


def _no_second_order(ctx, *_):
    raise RuntimeError("norm_project: second-order gradients are not supported")


torch.library.register_autograd("hycam::norm_project", _autograd_backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("hycam::norm_project_backward", _no_second_order, lib=_library)
