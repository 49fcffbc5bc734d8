"""Each fused kernel against its speed of light: what it must move and compute at the measured rates, and its time.

A kernel is timed alone, with the arguments that a whole call gave it. The whole call's result is checked before.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.harness.record import Entry
from benchmarks.harness.session import Session, describe, dtype_name, time_in_turn
from benchmarks.harness.timing import Work
from benchmarks.op.checks import ROUNDING, Oracle, WrongResultError
from benchmarks.op.peers import make_arguments, peer
from benchmarks.op.shapes import DECODE, TRAINING, Shape, floor_us
from hycam_kernels.backends.triton import modulation as triton_backend
from hycam_kernels.backends.triton import norm_projection as norm_triton_backend
from hycam_kernels.backends.triton.kernels.cost import Cost
from hycam_kernels.backends.triton.kernels.decode import decode_down_cost, decode_forward, decode_fusion_cost
from hycam_kernels.backends.triton.kernels.fusion_backward import (
    b_grad_cost,
    row_grad_cost,
    stream_grad_cost,
    v_grad_cost,
)
from hycam_kernels.backends.triton.kernels.fusion_forward import fusion_forward_cost
from hycam_kernels.backends.triton.kernels.norm_projection import norm_backward_cost, norm_projection_cost
from hycam_kernels.backends.triton.kernels.product_forward import product_forward_cost
from hycam_kernels.backends.triton.kernels.router import route_backward_cost, route_cost, token_mean_cost
from hycam_kernels.backends.triton.kernels.router_weight_grad import router_weight_grad_cost
from hycam_kernels.backends.triton.kernels.sum_parts import MAX_SUMS, sum_parts_cost
from hycam_kernels.backends.triton.launch import COMPILER_OPTIONS, Launcher
from hycam_kernels.backends.triton.tuning import Size, make_call
from hycam_kernels.inputs import DIFFERENTIABLE, NORM_DIFFERENTIABLE, NormProjectInputs, NormSaved, NormUpstream


class Launch(NamedTuple):
    """One launch of a kernel, which can be done again: kernels overwrite their results and nothing else."""

    kernel: Any
    grid: tuple[int, ...]
    config: dict[str, Any]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.config, **COMPILER_OPTIONS)


class LaunchLog(Launcher):
    """A launcher that keeps what it launched."""

    def __init__(self, family: str, *, inline_assembly: bool) -> None:
        super().__init__(family, inline_assembly=inline_assembly)
        self.launches: list[Launch] = []

    def __call__(self, kernel: Any, grid: tuple[int, ...], config: Mapping[str, Any], **arguments: Any) -> None:
        self.launches.append(Launch(kernel, grid, dict(config), arguments))
        super().__call__(kernel, grid, config, **arguments)


def _sizes(shape: Shape) -> tuple[int, int, int, int]:
    return shape.tokens, shape.d, shape.num_experts, shape.rank


def _sums(given: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    totals = ((given[f"parts_{index}"], given[f"total_{index}"]) for index in range(MAX_SUMS))
    return [(parts, total.numel(), total.itemsize) for parts, total in totals if total is not None]


# what each kernel must move and compute, by its name: (shape, its arguments, bytes of an element)
COSTS: dict[str, Callable[[Shape, Mapping[str, Any], int], Cost]] = {
    "router_kernel": lambda s, _, i: route_cost(s.tokens, s.d, s.num_experts, itemsize=i),
    "token_mean_kernel": lambda s, given, _: token_mean_cost(given["blocks"], s.num_experts),
    "router_backward_kernel": lambda s, given, _: route_backward_cost(s.tokens, s.num_experts, given["partials"]),
    "router_weight_grad_kernel": lambda s, _, i: router_weight_grad_cost(s.tokens, s.d, s.num_experts, itemsize=i),
    "fusion_forward_kernel": lambda s, _, i: fusion_forward_cost(*_sizes(s), itemsize=i),
    "product_forward_kernel": lambda s, given, i: product_forward_cost(
        *_sizes(s), kept=given["s"] is not None, itemsize=i
    ),
    "stream_grad_kernel": lambda s, _, i: stream_grad_cost(*_sizes(s), itemsize=i),
    "row_grad_kernel": lambda s, _, i: row_grad_cost(*_sizes(s), itemsize=i),
    "v_grad_kernel": lambda s, _, i: v_grad_cost(*_sizes(s), itemsize=i),
    "sum_parts_kernel": lambda _, given, __: sum_parts_cost(*_sums(given)),
    "b_grad_kernel": lambda s, _, i: b_grad_cost(*_sizes(s), itemsize=i),
    "decode_down_kernel": lambda s, given, i: decode_down_cost(*_sizes(s), splits=given["SPLITS"], itemsize=i),
    "decode_fusion_kernel": lambda s, given, i: decode_fusion_cost(*_sizes(s), splits=given["SPLITS"], itemsize=i),
    "norm_projection_kernel": lambda s, _, i: norm_projection_cost(*_sizes(s), itemsize=i),
    "norm_backward_kernel": lambda s, _, i: norm_backward_cost(s.tokens, s.d, itemsize=i),
}

Calls = Callable[[Launcher, Shape, torch.dtype, torch.device], None]


def training_calls(launch: Launcher, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """The op's forward and backward."""
    x = make_call(Size(*_sizes(shape)), dtype, device, training=True)
    *_, saved = triton_backend.forward(x, launch)
    grad_load, grad_router_prob = (torch.randn(shape.num_experts, device=device) for _ in range(2))
    needs = [getattr(x, name) is not None for name in DIFFERENTIABLE]
    grad_out = torch.randn_like(x.attn_output)
    triton_backend.backward(grad_out, grad_load, grad_router_prob, x, saved, needs, launch)


def decode_calls(launch: Launcher, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """The op on few tokens without gradients."""
    decode_forward(launch, make_call(Size(*_sizes(shape)), dtype, device, training=False))


def norm_calls(launch: Launcher, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """`norm_project` forward and backward.

    Raises:
        WrongResultError: h isn't the RMSNorm of the input: the op's own check doesn't cover it.
    """
    arguments = make_arguments(shape, dtype, device, noise=False)
    hidden_in, weight = arguments["hidden"], 1 + 0.1 * torch.randn(shape.d, device=device).to(dtype)
    lora_a, lora_n, router_weight = (arguments[name] for name in ("lora_a", "lora_n", "router_weight"))
    x = NormProjectInputs(hidden_in, weight, None, lora_a, lora_n, router_weight, 1e-6, "rms", dtype, "triton")
    hidden, v, logits, mean, rstd = norm_triton_backend.forward(x, launch)
    want = torch.nn.functional.rms_norm(hidden_in.double(), (shape.d,), weight.double(), 1e-6)
    error = ((hidden.double() - want).norm() / want.norm()).item()
    if not error <= 2 * ROUNDING[dtype]:
        raise WrongResultError(f"norm_project: relative error {error:.3g} against float64: not timed")
    needs = [getattr(x, name) is not None for name in NORM_DIFFERENTIABLE]
    grad_hidden, grad_v, grad_logits = (torch.randn_like(tensor) for tensor in (hidden, v, logits))
    norm_triton_backend.backward(
        NormUpstream(grad_hidden, grad_v, grad_logits), x, NormSaved(hidden, mean, rstd), needs, launch
    )


def measure_kernels(
    session: Session,
    dtype: torch.dtype,
    training: Sequence[Shape] = TRAINING,
    decode: Sequence[Shape] = DECODE,
) -> None:
    """Time every kernel at every shape, with its cost, its floor at the record's rates and its configuration."""
    plan: list[tuple[Shape, Calls, str]] = [(shape, training_calls, "paper") for shape in training]
    plan += [(shape, decode_calls, "inference") for shape in decode]
    plan += [(shape, norm_calls, "norm") for shape in training[:3]]
    for shape, calls, check in plan:
        if not session.starts(4, "kernel", shape, what=calls.__name__):
            continue
        try:
            if check != "norm":
                inference = check == "inference"
                arguments = make_arguments(shape, dtype, session.device, noise=not inference)
                Oracle(arguments, "paper", inference=inference).check(peer("fused"))
            logs = [_log(session.device) for _ in range(2)]
            for log in logs:
                calls(log, shape, dtype, session.device)
        except WrongResultError as error:
            session.add("kernel", shape, dtype=dtype_name(dtype), what=calls.__name__, peer="fused", wrong=str(error))
            continue
        except Exception as error:  # as in timing: the other calls are still measured
            session.add(
                "kernel", shape, dtype=dtype_name(dtype), what=calls.__name__, peer="fused", error=describe(error)
            )
            continue
        for same_kernel in zip(*(log.launches for log in logs), strict=True):
            _time_kernel(session, shape, dtype, same_kernel)


def _log(device: torch.device) -> LaunchLog:
    launcher = triton_backend.launcher(device)
    return LaunchLog(launcher.family, inline_assembly=launcher.inline_assembly)


def _time_kernel(session: Session, shape: Shape, dtype: torch.dtype, launches: Sequence[Launch]) -> None:
    first = launches[0]
    cost = COSTS[first.name](shape, first.arguments | first.config, dtype.itemsize)
    labels: Entry = {"dtype": dtype_name(dtype), "what": first.name, "config": first.config} | cost._asdict()
    labels["floor_us"] = floor_us(cost.flops, cost.bytes, *_rates(session, shape))
    work = Work(lambda i: launches[i], Launch.run, len(launches))
    time_in_turn(session, "kernel", shape, labels, session.timers[0], {"fused": lambda: work})


def _rates(session: Session, shape: Shape) -> tuple[float, float]:
    """FLOP/s of the library's product at this d, or any, and bytes/s of the copy, as the record has them."""
    rates = [entry for entry in session.record.entries if entry["group"] == "rate"]
    products = [entry for entry in rates if entry["what"] == "product"]
    same_width = [entry for entry in products if entry["shape"]["d"] == shape.d] or products
    (copy, *_) = [entry for entry in rates if entry["what"] == "copy"]
    return max(entry["per_second"] for entry in same_width), copy["per_second"]
