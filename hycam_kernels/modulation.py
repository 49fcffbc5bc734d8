"""`hycam_modulation`: checks, backend choice, and its place in autograd and torch.compile.

The op has two doors to the same forward, kept tensors and backward. Where a tracer looks on (torch.compile, fake
tensors) it is the `torch.library` op `hycam::modulation`, one node to the tracer, with a fake kernel and a registered
backward. In eager mode it is a plain `torch.autograd.Function`, which spares each pass the dispatcher's two ways
through Python; where no gradient is wanted, a few tokens need neither.
"""

from collections.abc import Iterable
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from hycam_kernels.backends.cpu import few_tokens as cpu_few_tokens
from hycam_kernels.backends.cpu import modulation as cpu_backend
from hycam_kernels.backends.torch import inference as torch_inference
from hycam_kernels.backends.torch import modulation as torch_backend
from hycam_kernels.backends.triton import modulation as triton_backend
from hycam_kernels.inputs import DIFFERENTIABLE, ModulationInputs, Saved, empty_gradients
from hycam_kernels.output import DeferredOutput, DeferredRouterMeans, HyCAMOutput, RouterMeans
from hycam_kernels.preparation import prepare


def hycam_modulation(
    hidden: Tensor,
    attn_output: Tensor,
    shared_weight: Tensor | None,
    lora_a: Tensor | None,
    lora_n: Tensor | None,
    lora_b: Tensor | None,
    router_weight: Tensor | None,
    *,
    tau: float = 0.5,
    gumbel: Tensor | None = None,
    seed: int | Tensor | None = None,
    hard: bool = False,
    token_mask: Tensor | None = None,
    scale: float = 1.0,
    shared_bias: Tensor | None = None,
    lora_a_bias: Tensor | None = None,
    lora_n_bias: Tensor | None = None,
    lora_b_bias: Tensor | None = None,
    router_bias: Tensor | None = None,
    expert_weight: Tensor | None = None,
    recompute: bool = False,
    residual: Tensor | None = None,
    projections: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> HyCAMOutput:
    r"""HyCAM's modulation of an attention output (CIKM 2025, equations 2-12).

    .. math::
        h_{out} = h_{att} + h_{att} \odot \Big(\mathrm{SiLU}(h W_s^T)
            + \sum_k p_k\,\mathrm{SiLU}\big(h (B_k N_k A_k)^T\big)\Big),\quad
        p = \mathrm{softmax}\big((h W_r^T + g) / \tau\big)

    Weights are in `nn.Linear` layout, out x in. T tokens in the leading dimensions (any number of them, T = 0 too), d
    features, E experts, rank r. Row-strided inputs are read in place where the leading dimensions collapse to one
    stride.

    Args:
        hidden: [..., d] h, what self-attention received.
        attn_output: [..., d] h_att, after the output projection.
        shared_weight: [d, d], or None for no shared CAM.
        lora_a: [E, r, d], or None for no experts; then lora_n, lora_b and router_weight are None too.
        lora_n: [E, r, r].
        lora_b: [E, d, r].
        router_weight: [E, d].
        tau: temperature of the Gumbel-softmax, at least 1e-30.
        gumbel: [..., E] explicit noise, a constant for autograd.
        seed: int or 0-d int64 tensor (on hidden's device or the CPU): noise is ``gumbel_noise(seed, T, E)``. Without
            gumbel and seed there is no noise. A captured CUDA graph has an int, or a CPU tensor, as it was, and draws
            the same noise at every replay; a tensor on the device is read each time.
        hard: p is one-hot at its largest entry in the output, the load and the balance loss; its gradient is that of
            the soft p (straight-through).
        token_mask: [...] bool, the tokens that count in the load and the balance loss; all by default.
        scale: ``A_k = SiLU(scale * (B_k (N_k (A_k h + a_k) + n_k) + b_k))``.
        shared_bias: [d].
        lora_a_bias: [E, r], a.
        lora_n_bias: [E, r], n.
        lora_b_bias: [E, d], b; with full-rank experts, their bias.
        router_bias: [E].
        expert_weight: [E, d, d] full-rank experts in place of lora_a, lora_n and lora_b.
        recompute: keep neither S = h W_s^T nor V = h (N A)^T for the backward, and make them again there.
        residual: [..., d] h_in: ``h_out = h_att + (h_in + h_att) * A_fusion``.
        projections: V [..., E, r] and logits [..., E] of h, as `norm_project` makes them, in place of lora_a, lora_n
            and router_weight (and of their biases, which V and the logits would hold); differentiable in both.
        backend: "auto", "torch" or "triton"; see `explain_backend`.

    Returns:
        `HyCAMOutput`.

    dtypes: float64, float32, bfloat16 and float16. Matrix products run in autocast's dtype where autocast is on, else
    in hidden's; weights of another dtype are cast to it. Logits, softmax, activations and sums are float32 (float64 for
    float64), and so is what h_att and h_in are read in: a float64 attn_output beside a float32 hidden gives an h_out of
    float32's precision. h_out has attn_output's dtype, each gradient the dtype of its tensor.

    Raises:
        TypeError: a non-float tensor, a ``token_mask`` that isn't bool, a ``seed``, ``tau`` or ``scale`` of another
            type.
        ValueError: a shape, a device mismatch, ``tau`` below 1e-30 or infinite, ``gumbel`` together with ``seed``,
            noise without experts, experts given in part, an unknown backend.
        RuntimeError: ``backend="triton"`` where it can't run, with the reason; a second-order gradient; forward-mode
            derivatives and other transforms of torch.func.
    """
    call = prepare(
        hidden, attn_output, shared_weight, lora_a, lora_n, lora_b, router_weight,
        tau=tau, gumbel=gumbel, seed=seed, hard=hard, token_mask=token_mask, scale=scale,
        shared_bias=shared_bias, lora_a_bias=lora_a_bias, lora_n_bias=lora_n_bias, lora_b_bias=lora_b_bias,
        router_bias=router_bias, expert_weight=expert_weight, recompute=recompute, residual=residual,
        projections=projections, backend=backend,
    )  # fmt: skip
    out, means = _run(call)
    return HyCAMOutput(out.view(attn_output.shape), means.load, means.router_prob, means.balance_loss)


def modulate(hidden: Tensor, attn_output: Tensor, *args: Any, training: bool, **kwargs: Any) -> DeferredOutput:
    """`hycam_modulation` whose router's means may be made when they're read only.

    Takes the arguments of `hycam_modulation`, which must fit each other: only in training they're checked.
    ``token_mask`` must not change before the means are read.

    Args:
        training: whether a call without gradients may be a checkpoint's first forward, which must be, bit for bit, the
            one that the backward pass makes.
    """
    call = prepare(hidden, attn_output, *args, training=training, fitting=not training, **kwargs)
    out, means = _run(call)
    return DeferredOutput(out.view(attn_output.shape), means)


def explain_backend(hidden: Tensor, attn_output: Tensor, *args: Any, **kwargs: Any) -> str:
    """Which backend ``backend="auto"`` picks for this call of `hycam_modulation`, and why not the others.

    Takes the arguments of `hycam_modulation`, and raises what it would raise.
    """
    call = prepare(hidden, attn_output, *args, **kwargs)
    refusal = _triton_refusal(call)
    if refusal:
        return f"torch: the triton backend can't run this call: {refusal}{cpu_backend.explain(call)}"
    return "triton: the fused kernels can run this call; the torch backend is their fallback"


def _run(call: ModulationInputs) -> tuple[Tensor, RouterMeans | DeferredRouterMeans]:
    """h_out [T, d] and the router's means, by the backend that the call asks for."""
    backend = call.backend
    if backend == "auto":
        backend = "torch" if _triton_refusal(call) else "triton"
    elif backend == "triton" and (refusal := _triton_refusal(call)):
        raise RuntimeError(f"hycam_modulation: backend='triton' can't run this call: {refusal}")
    is_traced = _is_traced(call)
    if backend == "torch" and not is_traced and _is_few_tokens_inference(call):
        return _few_tokens(call)
    if backend != call.backend:
        call = call._replace(backend=backend)
    if triton_backend.decodes(call):
        out, *means = torch.ops.hycam.modulation_decode(*call)
        return out, RouterMeans(*means)
    run = torch.ops.hycam.modulation if is_traced else _Modulation.apply
    out, load, router_prob, *_ = run(*call)
    return out, RouterMeans(load, router_prob, (load * router_prob).sum())


def _is_few_tokens_inference(call: ModulationInputs) -> bool:
    """Whether `inference` takes the call of the torch backend; not inside forward mode, which the autograd function
    refuses."""
    return call.inference and forward_ad._current_level < 0 and torch_inference.takes(call)


def _triton_refusal(call: ModulationInputs) -> str | None:
    """Why the triton backend can't run the call; None where it can."""
    return triton_backend.refusal(call)


def _few_tokens(call: ModulationInputs) -> tuple[Tensor, DeferredRouterMeans]:
    if cpu_few_tokens.takes(call):
        out, probs, logits = cpu_few_tokens.forward(call)
        return out, DeferredRouterMeans(probs, logits, call.token_mask)
    if call.seed is not None and cpu_backend.refusal(call) is None:
        call = call._replace(gumbel=cpu_backend.draw_noise(call), seed=None)
    device_type = call.hidden.device.type
    if torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            out, probs, logits = torch_inference.forward(call)
    else:
        out, probs, logits = torch_inference.forward(call)
    return out, DeferredRouterMeans(probs, logits, call.token_mask)


_PLAIN_TYPES = {Tensor, Parameter, NoneType, float, bool, str, torch.dtype}


def _is_traced(values: Iterable[object]) -> bool:
    """Whether somebody must see the library's op: torch.compile, a dispatch mode, a tensor subclass (a fake tensor)."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or not _PLAIN_TYPES.issuperset(map(type, values))
    )


_SCHEMA_TYPES = {"token_mask": "Tensor?", "tau": "float", "hard": "bool", "scale": "float"} | {
    "compute_dtype": "ScalarType", "keep": "bool", "needs_grad": "bool", "backend": "str", "inference": "bool",
    "hidden": "Tensor", "attn_output": "Tensor",
}  # fmt: skip
_INPUT_SCHEMA = ", ".join(f"{_SCHEMA_TYPES.get(name, 'Tensor?')} {name}" for name in ModulationInputs._fields)
_SAVED_SCHEMA = ", ".join(f"Tensor {name}" for name in Saved._fields)
_GRAD_SCHEMA = "Tensor? grad_out, Tensor? grad_load, Tensor? grad_router_prob"

_library = torch.library.Library("hycam", "DEF")
_library.define(f"modulation({_INPUT_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
_library.define(f"modulation_decode({_INPUT_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(f"modulation_backward({_GRAD_SCHEMA}, {_INPUT_SCHEMA}, {_SAVED_SCHEMA}, bool[] needs) -> Tensor[]")


def _backend(inputs: ModulationInputs):
    if inputs.backend == "triton":
        return triton_backend
    return torch_backend if cpu_backend.refusal(inputs) else cpu_backend


def _modulation(*args) -> tuple[Tensor, ...]:
    inputs = ModulationInputs(*args)
    if inputs.backend == "torch" and _is_few_tokens_inference(inputs):
        out, means = _few_tokens(inputs)
        # no backward reads what is kept, but the op's results have their shapes, and none is an argument
        saved = torch_inference.as_saved(inputs, means.probs, means.logits)
        return out, means.load, means.router_prob, *saved
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        out, load, router_prob, saved = _backend(inputs).forward(inputs)
    return out, load, router_prob, *saved


def _modulation_decode(*args) -> tuple[Tensor, ...]:
    return triton_backend.decode(ModulationInputs(*args))


def _modulation_backward(grad_out, grad_load, grad_router_prob, *args) -> list[Tensor]:
    inputs, saved, needs = _split_backward_args(args)
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        return _backend(inputs).backward(grad_out, grad_load, grad_router_prob, inputs, saved, needs)


for _implementation in (_modulation, _modulation_decode, _modulation_backward):
    _library.impl(_implementation.__name__.removeprefix("_"), _implementation, "CompositeExplicitAutograd")


def _split_backward_args(args: tuple) -> tuple[ModulationInputs, Saved, list[bool]]:
    at = len(ModulationInputs._fields)
    return ModulationInputs(*args[:at]), Saved(*args[at:-1]), args[-1]


@torch.library.register_fake("hycam::modulation", lib=_library)
def _modulation_fake(*args) -> tuple[Tensor, ...]:
    x = ModulationInputs(*args)
    tokens, d = x.hidden.shape
    kept = x.compute_dtype
    s = (tokens, d) if x.keep and x.shared_weight is not None else (0,)
    v = (tokens, x.num_experts * x.rank) if x.keep and x.lora_a is not None else (0,)
    return (
        torch.empty_like(x.attn_output, memory_format=torch.contiguous_format),
        *(x.hidden.new_empty(x.num_experts, dtype=x.sum_dtype) for _ in range(2)),
        *(x.hidden.new_empty(shape, dtype=kept) for shape in (s, v)),
        x.hidden.new_empty((tokens, x.num_experts), dtype=x.sum_dtype),
        x.hidden.new_empty((tokens, x.num_experts) if x.given_logits is None else (0,), dtype=x.sum_dtype),
    )


@torch.library.register_fake("hycam::modulation_decode", lib=_library)
def _modulation_decode_fake(*args) -> tuple[Tensor, ...]:
    x = ModulationInputs(*args)
    return (
        torch.empty_like(x.attn_output, memory_format=torch.contiguous_format),
        *(x.hidden.new_empty(shape, dtype=x.sum_dtype) for shape in (x.num_experts, x.num_experts, ())),
    )


@torch.library.register_fake("hycam::modulation_backward", lib=_library)
def _modulation_backward_fake(grad_out, grad_load, grad_router_prob, *args) -> list[Tensor]:
    inputs, _, needs = _split_backward_args(args)
    return empty_gradients(inputs, DIFFERENTIABLE, needs)


def _setup_context(ctx, inputs, output) -> None:
    saved = output[3:]
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs), *saved)
    ctx.options = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, grad_out, grad_load, grad_router_prob, *_):
    count = len(ctx.options)
    kept = ctx.saved_tensors  # read once: non-reentrant checkpointing refuses to unpack a tensor twice
    tensors, saved = kept[:count], kept[count:]
    inputs = (option if tensor is None else tensor for tensor, option in zip(tensors, ctx.options, strict=True))
    needs = list(ctx.needs_input_grad[: len(DIFFERENTIABLE)])
    # where a graph of the backward is wanted, the library's op is in it and refuses to be differentiated
    as_op = torch.is_grad_enabled() or _is_traced(kept)
    run = torch.ops.hycam.modulation_backward if as_op else _modulation_backward
    grads = run(grad_out, grad_load, grad_router_prob, *inputs, *saved, needs)
    rest = count - len(DIFFERENTIABLE)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * rest


def _no_second_order(ctx, *_):
    raise RuntimeError("hycam_modulation: second-order gradients are not supported")


class _Modulation(torch.autograd.Function):
    """`hycam::modulation` with its backward, without the dispatcher; what is kept is no output here."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _modulation(*inputs)
        _setup_context(ctx, inputs, output)
        return output[:3]

    backward = staticmethod(_autograd_backward)

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError("hycam_modulation: forward-mode derivatives are not supported")


torch.library.register_autograd("hycam::modulation", _autograd_backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("hycam::modulation_backward", _no_second_order, lib=_library)
