"""A result is compared with the float64 reference before it is timed; a wrong one is never timed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.op.peers import TAU, Arguments, Outputs, Peer, detached, leaves, released_scale, upstream
from benchmarks.op.released import noisy_logits
from hycam_kernels.reference import modulation_reference

# relative errors that are granted beside twice eager's: one rounding of a 16-bit result, the order of a float32 sum
ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5, torch.float64: 1e-12}


class WrongResultError(RuntimeError):
    """A peer's output or gradient is further from the float64 reference than its precision explains."""


Results = dict[str, Tensor]


def results(call: Callable[[Arguments], Outputs], arguments: Arguments, *, inference: bool = False) -> Results:
    """Outputs and, unless for inference, gradients of every argument that requires one, by name."""
    device = next(iter(arguments.values())).device
    if inference:
        arguments = detached(arguments)
    with torch.set_grad_enabled(not inference), generator_state(device):
        outputs = call(arguments)
    named = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if inference:
        return named
    grads = torch.autograd.grad(outputs, leaves(arguments), upstream(outputs))
    wanted = [name for name, tensor in arguments.items() if tensor.requires_grad]
    return named | {f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True)}


def compare(peer_name: str, got: Results, truth: Results, eager: Results) -> None:
    """Judge results by those in float64 and by what an eager run in the measured dtype makes of them.

    A relative error may be twice eager's, plus a rounding; the largest error of a row likewise, with four roundings.

    Raises:
        WrongResultError: naming the peer, the result, its error and the bound.
    """
    for name, value in got.items():
        rounding = ROUNDING[value.dtype]
        for what, error, allowed, slack in zip(
            ("whole", "worst row"), _errors(value, truth[name]), _errors(eager[name], truth[name]), (1, 4), strict=True
        ):
            bound = 2 * allowed + slack * rounding
            if not error <= bound:
                raise WrongResultError(
                    f"{peer_name}: {name}: relative error {error:.3g} ({what}) against float64, bound {bound:.3g}: "
                    "not timed"
                )


class Oracle:
    """The reference in float64 and in the measured dtype on one set of arguments, with gradients or for inference."""

    def __init__(self, arguments: Arguments, variant: str, *, inference: bool = False) -> None:
        self.arguments = arguments
        self.variant = variant
        self.inference = inference
        self._expected: dict[bool, tuple[Results, Results]] = {}

    def check(self, peer: Peer) -> None:
        """Run the peer as it will be timed; raises what `compare` does."""
        noise = self._drawn_noise() if peer.draws_noise else self.arguments.get("gumbel")
        got = results(peer.call, self.arguments, inference=self.inference)
        compare(peer.name, got, *self._reference(noise, own_noise=peer.draws_noise))

    def _drawn_noise(self) -> Tensor:
        """Noise that gives the reference the noisy logits which a generator-drawing peer computes in its own dtype.

        Near-ties of its 16-bit logits then go the same way, so that hard routing can be compared at all.
        """
        arguments = self.arguments
        with torch.no_grad(), generator_state(arguments["hidden"].device):
            noisy = noisy_logits(*(arguments[name] for name in ("hidden", "router_weight", "router_bias")))
        hidden, weight, bias = (arguments[name].double() for name in ("hidden", "router_weight", "router_bias"))
        return noisy.double() - torch.nn.functional.linear(hidden, weight, bias).detach()

    def _reference(self, noise: Tensor | None, *, own_noise: bool) -> tuple[Results, Results]:
        if own_noise not in self._expected:
            drawn = {} if noise is None else {"gumbel": noise}
            double, same = _cast(self.arguments, torch.float64) | drawn, self.arguments | drawn
            self._expected[own_noise] = (
                results(self._formula, double, inference=self.inference),
                results(self._formula, same, inference=self.inference),
            )
        return self._expected[own_noise]

    def _formula(self, arguments: Arguments) -> Outputs:
        tensors = {name: tensor for name, tensor in arguments.items() if name != "seed"}
        if self.variant == "paper":
            output = modulation_reference(**tensors, tau=TAU)
            return output.hidden_states, output.balance_loss
        output = modulation_reference(**tensors, tau=TAU, hard=True, scale=released_scale(arguments))
        return (arguments["residual"] + output.hidden_states,)


def _cast(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    return {
        name: tensor.detach().to(dtype).requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor
        for name, tensor in arguments.items()
    }


def _errors(value: Tensor, truth: Tensor) -> tuple[float, float]:
    """Relative error of the whole, and the largest of a row relative to the typical row."""
    want = truth.double().reshape(-1, truth.shape[-1] if truth.ndim else 1)
    got = value.double().reshape(want.shape)
    size = want.norm().clamp_min(1e-30)
    rows = (got - want).norm(dim=-1) * want.shape[0] ** 0.5 / size
    return ((got - want).norm() / size).item(), rows.max().item()


@contextmanager
def generator_state(device: torch.device) -> Iterator[None]:
    """torch's generator at a fixed seed inside the block, as it was after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(11)
        yield
