"""What is compared, on equal inputs.

Two variants of the op: ``paper`` (the defaults) and ``released`` (biases, hard routing, scale, residual stream). A peer
takes the arguments of `make_arguments` and returns the tensors that the rest of a model would differentiate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.timing import Work
from benchmarks.op.released import ALPHA, released_layer
from benchmarks.op.shapes import Shape
from hycam_kernels import gumbel_noise, hycam_modulation
from hycam_kernels.output import HyCAMOutput
from hycam_kernels.reference import modulation_reference

TAU = 0.5
Arguments = dict[str, Any]  # tensors by name
Outputs = tuple[Tensor, ...]

STREAMS = ("hidden", "attn_output")
WEIGHTS = ("shared_weight", "lora_a", "lora_n", "lora_b", "router_weight")
BIASES = ("shared_bias", "lora_a_bias", "lora_n_bias", "lora_b_bias", "router_bias")


def make_arguments(
    shape: Shape, dtype: torch.dtype, device: torch.device, variant: str = "paper", seed: int = 0, noise: bool = True
) -> Arguments:
    """Random tensors of `hycam_modulation` by name, floats requiring grad; noise as ``seed`` and again as ``gumbel``.

    Weights have variance 1 / fan-in, so that every term of the op is of the activations' size; a zero B or W_s, as
    training starts with, would hide wrong results. The released code's router is frozen.
    """
    generator = torch.Generator(device).manual_seed(seed)
    T, d, E, r = shape.tokens, shape.d, shape.num_experts, shape.rank

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(size, generator=generator, device=device) * scale
        return values.to(dtype).requires_grad_()

    arguments = {name: draw(T, d) for name in STREAMS}
    for name, size in zip(WEIGHTS, ((d, d), (E, r, d), (E, r, r), (E, d, r), (E, d)), strict=True):
        arguments[name] = draw(*size, scale=size[-1] ** -0.5)
    if variant == "released":
        arguments["residual"] = draw(T, d)
        for name, size in zip(BIASES, ((d,), (E, r), (E, r), (E, d), (E,)), strict=True):
            arguments[name] = draw(*size, scale=0.5)
        for name in ("router_weight", "router_bias"):
            arguments[name].requires_grad_(False)
    if noise:
        arguments["seed"] = torch.full((), seed + 1, dtype=torch.int64, device=device)
        arguments["gumbel"] = gumbel_noise(seed + 1, T, E, device)
    return arguments


def leaves(arguments: Arguments) -> list[Tensor]:
    return [tensor for tensor in arguments.values() if tensor.requires_grad]


def detached(arguments: Arguments) -> Arguments:
    """The arguments as a model without gradients has them: one that carries a gradient is a checkpoint's."""
    return {name: tensor.detach() for name, tensor in arguments.items()}


def released_scale(arguments: Arguments) -> float:
    return ALPHA / arguments["lora_a"].shape[1]


@dataclass(frozen=True)
class Peer:
    """One implementation of a variant of the op.

    Attributes:
        call: (arguments) -> (h_out, balance loss), or (residual stream after attention,) for the released variant.
        draws_noise: it takes its noise from torch's generator, not from ``seed`` or ``gumbel``.
    """

    name: str
    variant: str
    call: Callable[[Arguments], Outputs]
    draws_noise: bool = False


def _op(**options) -> Callable[[Arguments], Outputs]:
    """The package's op with noise from the seed, as a model calls it."""

    def call(arguments: Arguments) -> Outputs:
        tensors = {name: tensor for name, tensor in arguments.items() if name != "gumbel"}
        return _differentiable(hycam_modulation(**tensors, tau=TAU, **options))

    return call


def _released_op(**options) -> Callable[[Arguments], Outputs]:
    """The package's op with the released code's settings, and the layer's own residual add."""

    def call(arguments: Arguments) -> Outputs:
        tensors = {name: tensor for name, tensor in arguments.items() if name != "gumbel"}
        output = hycam_modulation(**tensors, tau=TAU, hard=True, scale=released_scale(arguments), **options)
        return (arguments["residual"] + output.hidden_states,)

    return call


def _released(arguments: Arguments) -> Outputs:
    tensors = {name: tensor for name, tensor in arguments.items() if name not in ("gumbel", "seed")}
    return (released_layer(**tensors, tau=TAU, scale=released_scale(arguments)),)


def eager(arguments: Arguments) -> Outputs:
    """The reference under plain autograd. Its noise is ready-made, which costs it nothing."""
    tensors = {name: tensor for name, tensor in arguments.items() if name != "seed"}
    return _differentiable(modulation_reference(**tensors, tau=TAU))


def _differentiable(output: HyCAMOutput) -> Outputs:
    return output.hidden_states, output.balance_loss


def compiled(mode: str) -> Callable[[Arguments], Outputs]:
    """The reference through torch.compile for static shapes. Drops what was compiled before: its number is capped."""
    torch._dynamo.reset()
    return torch.compile(eager, fullgraph=True, dynamic=False, mode=mode)


def peer(name: str) -> Peer:
    """A peer by its name in records; ``compile`` peers are compiled at their first call."""
    if name == "eager":
        return Peer(name, "paper", eager)
    if name == "compile":
        return Peer(name, "paper", compiled("default"))
    if name == "compile-max-autotune":
        # graphs of its own would copy the rotated inputs at each call: the timer captures all peers alike
        return Peer(name, "paper", compiled("max-autotune-no-cudagraphs"))
    if name == "released":
        return Peer(name, "released", _released, draws_noise=True)
    family, _, option = name.partition("-")
    backend = {"torch": "torch", "fused": "triton"}.get(family)
    if backend is None or option not in ("", "recompute", "released"):
        raise ValueError(f"peer: no peer is called {name!r}")
    if option == "released":
        return Peer(name, "released", _released_op(backend=backend))
    return Peer(name, "paper", _op(backend=backend, recompute=option == "recompute"))


def upstream(outputs: Outputs) -> list[Tensor]:
    """A fixed random gradient for each output. Its values are bfloat16's, so that they are the same in every dtype."""
    generator = torch.Generator(outputs[0].device).manual_seed(7)
    return [
        torch.randn(output.shape, generator=generator, device=output.device).bfloat16().to(output.dtype)
        for output in outputs
    ]


def work(call: Callable[[Arguments], Outputs], sets: list[Arguments], pass_: str) -> Work:
    """One pass of a peer over sets of inputs: training's ``forward``, ``backward`` or ``both``, or ``inference``."""

    @torch.no_grad()
    def infer(arguments: Arguments) -> Outputs:
        return call(arguments)

    if pass_ == "forward":
        return Work(lambda i: sets[i], call, len(sets))
    if pass_ == "inference":
        plain = [detached(arguments) for arguments in sets]
        return Work(lambda i: plain[i], infer, len(plain))
    grads = upstream(call(sets[0]))
    inputs = [leaves(arguments) for arguments in sets]

    def backward(state: tuple[Outputs, list[Tensor]]) -> tuple[Tensor, ...]:
        outputs, wanted = state
        return torch.autograd.grad(outputs, wanted, grads)

    if pass_ == "backward":
        return Work(lambda i: (call(sets[i]), inputs[i]), backward, len(sets), on_device=True)
    if pass_ == "both":
        return Work(lambda i: i, lambda i: backward((call(sets[i]), inputs[i])), len(sets))
    raise ValueError(f"work: no pass is called {pass_!r}")
