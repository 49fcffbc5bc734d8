"""The longest row that a training step can take within a memory: by measurement on CUDA, by count anywhere.

The count runs the step on fake tensors, which have shapes and no data, of two lengths and two numbers of layers; every
part of a step grows linearly with both, so four counts give any other. It holds parameters, gradients and the
optimizer's moments all the time, as a step that accumulates gradients does, and the most that lives beside them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from benchmarks.harness.memory import release
from benchmarks.harness.session import Session, describe, dtype_name
from benchmarks.models.backbones import ModelShape
from benchmarks.models.training import PLAIN, Setting, TrainingStep, adapted, loss_of, token_ids
from hycam.live_bytes import LiveBytes

CAPACITY = 80 * 10**9
_LENGTHS = (1024, 2048)
_LAYERS = (2, 4)
# lengths are looked for in steps of so many tokens
_GRAIN = 256


def counted_bytes(name: str, shape: ModelShape, dtype: torch.dtype, setting: Setting = PLAIN) -> int:
    """Bytes of a training step, all in all, without running it."""
    model = adapted(name, shape, dtype, torch.device("meta"), setting)
    mode = FakeTensorMode()
    _make_fake(model, mode)
    with mode:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trainable:
            parameter.grad = torch.zeros_like(parameter)
        ids = token_ids(shape, torch.device("cpu"))
        held: list[Tensor] = [*model.parameters(), *model.buffers(), ids]
        held += [parameter.grad for parameter in trainable if parameter.grad is not None]
        with LiveBytes(held) as count:
            loss_of(model, ids).backward()
    moments = 2 * sum(parameter.nbytes for parameter in trainable)
    return sum(tensor.nbytes for tensor in held) + moments + count.peak


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Turn the tensors of a model on the meta device into fake ones on the CPU, shared ones into shared ones."""
    fakes: dict[Tensor, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if tensor not in fakes:
            made: Tensor = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            fakes[tensor] = made
        return fakes[tensor]

    for module in model.modules():
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in held:
            for key, tensor in tensors.items():
                if tensor is not None:
                    tensors[key] = fake(tensor)


def extrapolate(count: Callable[[int, int], int]) -> Callable[[int, int], float]:
    """The function of (length, layers), linear in each, that has the values of ``count`` at four points."""
    (short, long), (few, many) = _LENGTHS, _LAYERS
    at = {(length, layers): count(length, layers) for length in _LENGTHS for layers in _LAYERS}

    def value(length: int, layers: int) -> float:
        x, y = (length - short) / (long - short), (layers - few) / (many - few)
        return (
            at[short, few] * (1 - x) * (1 - y) + at[long, few] * x * (1 - y)
            + at[short, many] * (1 - x) * y + at[long, many] * x * y
        )  # fmt: skip

    return value


def counted_longest(
    name: str, shape: ModelShape, dtype: torch.dtype, setting: Setting = PLAIN, capacity: int = CAPACITY
) -> int:
    """Tokens of the longest row that fits by count; 0 where none does."""
    layers = shape.config.num_hidden_layers
    value = extrapolate(
        lambda length, few: counted_bytes(name, replace(shape, length=length, layers=few), dtype, setting)
    )
    base, slope = value(0, layers), value(1, layers) - value(0, layers)
    return max(int((capacity - base) / slope), 0) // _GRAIN * _GRAIN


def measured_longest(
    name: str, shape: ModelShape, dtype: torch.dtype, device: torch.device, setting: Setting = PLAIN,
    capacity: int = CAPACITY,
) -> int:  # fmt: skip
    """Tokens of the longest row whose step ran on the CUDA device with its allocator held to the capacity."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(capacity / total, 1.0), device)
    try:
        step = TrainingStep(name, replace(shape, length=_GRAIN), dtype, device, setting)

        def fits(length: int) -> bool:
            step.batches[:] = [token_ids(replace(shape, length=length), device)] * len(step.batches)
            try:
                step.run(0)
                torch.cuda.synchronize()
            except torch.OutOfMemoryError:
                return False
            finally:
                step.model.zero_grad(set_to_none=True)
                release(device)
            return True

        return largest(fits) if min(capacity, total) else 0
    except torch.OutOfMemoryError:
        return 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def largest(fits: Callable[[int], bool], grain: int = _GRAIN) -> int:
    """The largest multiple of the grain that fits, where all smaller ones do: by doubling, then by halves."""
    low, high = 0, grain
    while fits(high):
        low, high = high, 2 * high
    while high - low > grain:
        middle = (low + high) // 2 // grain * grain
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def measure_longest(
    session: Session, shape: ModelShape, dtype: torch.dtype, names: Sequence[str], settings: Sequence[Setting]
) -> None:
    """An entry for each method and setting: by measurement on CUDA, else by count."""
    on_cuda = session.device.type == "cuda"
    method = "measurement" if on_cuda else "count"
    for setting in settings:
        for name in names:
            labels = {"dtype": dtype_name(dtype), "setting": str(setting), "method": method, "peer": name}
            if not session.starts(25 if on_cuda else 8, "longest", shape, **labels):
                continue
            try:
                tokens = (
                    measured_longest(name, shape, dtype, session.device, setting)
                    if on_cuda
                    else counted_longest(name, shape, dtype, setting)
                )
            except Exception as error:  # as in `models`: the other methods are measured
                session.add("longest", shape, **labels, error=describe(error))
                continue
            finally:
                release(session.device)
            session.add("longest", shape, **labels, capacity_bytes=CAPACITY, longest_tokens=tokens)
