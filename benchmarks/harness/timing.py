"""Timers: each turns a piece of work into a sampler, whose every call is one measured time in microseconds."""

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Sampler = Callable[[], float]
Sample = TypeVar("Sample")

# written before each graph replay: it evicts L2 and keeps the device busy while the host queues the replay; then read,
# so that the lines that were written leave L2 before the sample and not inside it
_FLUSH_BYTES = 512 << 20


@dataclass(frozen=True)
class Work:
    """What is measured: ``run(setup(i))`` for the i-th of ``sets`` sets of inputs; setup's time doesn't count.

    ``on_device`` tells whether setup itself runs device work (a backward's forward).
    """

    setup: Callable[[int], Any]
    run: Callable[[Any], Any]
    sets: int
    on_device: bool = False


class Timer(Protocol):
    """``method`` names the clock in records; ``prepare`` warms up and returns the sampler."""

    method: str

    def prepare(self, work: Work) -> Sampler: ...


class HostTimer:
    """The host's clock, for work that the host itself does.

    Args:
        cpu_time: the processor time of this process instead, which other processes hardly change. Threads that wait for
            each other spend it too: it is meant for one thread.
    """

    def __init__(self, warmup: int = 2, *, cpu_time: bool = False) -> None:
        self.method = "cpu" if cpu_time else "host"
        self.warmup = warmup
        self._clock = time.process_time if cpu_time else time.perf_counter

    def prepare(self, work: Work) -> Sampler:
        indices = itertools.cycle(range(work.sets))

        def sample() -> float:
            state = work.setup(next(indices))
            start = self._clock()
            work.run(state)
            return (self._clock() - start) * 1e6

        for _ in range(self.warmup):
            sample()
        return sample


class EventTimer:
    """CUDA events around a call on an idle device: what a caller waits for, launches included."""

    method = "events"

    def __init__(self, warmup: int = 3) -> None:
        self.warmup = warmup

    def prepare(self, work: Work) -> Sampler:
        indices = itertools.cycle(range(work.sets))

        def sample() -> float:
            state = work.setup(next(indices))
            torch.cuda.synchronize()
            return _between_events(lambda: work.run(state))

        for _ in range(self.warmup):
            sample()
        return sample


class GraphTimer:
    """CUDA events around a CUDA graph's replay: the device's own time, free of the host.

    Each set of inputs has a graph of its own; with ``chain`` above 1 a graph runs that many sets one after the other
    and the time is divided, for work of a few microseconds. A chained setup must not run device work.
    """

    method = "graph"

    def __init__(self, warmup: int = 3, chain: int = 1) -> None:
        self.warmup = warmup
        self.chain = chain

    def prepare(self, work: Work) -> Sampler:
        flush = _flush_buffer()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for index in range(self.warmup):
                work.run(work.setup(index % work.sets))
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        chains = max(work.sets // self.chain, 1)
        graphs = [self._capture(work, [(start * self.chain + i) % work.sets for i in range(self.chain)])
                  for start in range(chains)]  # fmt: skip
        turns = itertools.cycle(graphs)

        def sample() -> float:
            before, graph, _ = next(turns)
            if before is not None:
                before.replay()
            flush.zero_()
            flush.max()
            return _between_events(graph.replay) / self.chain

        for _ in graphs:
            sample()
        return sample

    def _capture(
        self, work: Work, indices: list[int]
    ) -> tuple[torch.cuda.CUDAGraph | None, torch.cuda.CUDAGraph, list[Any]]:
        """The graph of setup (None where it has none), that of the run, and what must stay alive with them."""
        before = None
        if work.on_device:
            before = torch.cuda.CUDAGraph()
            with torch.cuda.graph(before):
                states = [work.setup(index) for index in indices]
        else:
            states = [work.setup(index) for index in indices]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=None if before is None else before.pool()):
            results = [work.run(state) for state in states]
        return before, graph, [states, results]


def _flush_buffer() -> Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def _between_events(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3


def device_clock(device: torch.device) -> Callable[[], float]:
    """A clock in seconds of what the device has done: on CUDA each reading waits for all work queued before it."""
    if device.type == "cpu":
        return time.perf_counter
    last = torch.cuda.Event(enable_timing=True)
    last.record()
    reading = 0.0

    def read() -> float:
        nonlocal last, reading
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        # from one reading to the next: events give float32, too coarse since a far origin
        reading += last.elapsed_time(event) / 1e3
        last = event
        return reading

    return read


def alternate(
    samplers: Mapping[str, Callable[[], Sample]], rounds: int, keep_on: Callable[[], bool]
) -> dict[str, list[Sample]]:
    """One sample of each in turn, ``rounds`` times while ``keep_on()``: what disturbs the machine disturbs all."""
    samples: dict[str, list[Sample]] = {name: [] for name in samplers}
    for round_ in range(rounds):
        if round_ and not keep_on():
            break
        for name, sample in samplers.items():
            samples[name].append(sample())
    return samples


def sets_beyond_cache(tensors: Mapping[str, Any], device: torch.device) -> int:
    """How many copies of the inputs together exceed three times the L2 cache; 2 at least, 1 on the CPU."""
    if device.type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    size = sum(t.numel() * t.element_size() for t in tensors.values() if isinstance(t, Tensor))
    return max(2, 3 * cache // max(size, 1) + 1)
