"""Stand-ins for CUDA on a machine without it: for what the timers ask of `torch.cuda`, and for a whole GPU."""

import contextlib
import itertools
import resource
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class FakeCuda:
    """It runs the work at once; ``log`` has, in order, what a timer asked of the device, and work adds its own lines.

    A graph notes its capture, and each replay does the captured calls' lines again and takes the time of the capture.

    Args:
        clock: of the events, in milliseconds; by default every line moves it on by a microsecond.
    """

    def __init__(self, monkeypatch, clock: Callable[[], float] | None = None) -> None:
        self.log: list[str] = []
        self.capturing: list[str] | None = None
        self.clock = clock or (lambda: len(self.log) / 1e3)
        self.replayed = 0.0
        names = itertools.count()
        fake = self

        class Graph:
            def __init__(self) -> None:
                self.name = f"graph {next(names)}"
                self.lines: list[str] = []
                self.took = 0.0

            def pool(self):
                return self.name

            def replay(self) -> None:
                fake.note(f"replay {self.name}")
                for line in self.lines:
                    fake.note(line)
                fake.replayed += self.took

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing
                self.at: float | None = None

            def record(self) -> None:
                fake.note("event")
                self.at = fake.now()

            def elapsed_time(self, other) -> float:
                assert fake.log[-1] == "synchronize", "an event was read before the device was waited for"
                return other.at - self.at

        @contextlib.contextmanager
        def graph(captured: Graph, pool=None):
            assert fake.capturing is None
            fake.note(f"capture {captured.name}" + (f" in pool of {pool}" if pool else ""))
            fake.capturing = captured.lines
            start = fake.now()
            try:
                yield
            finally:
                fake.capturing = None
                captured.took = fake.now() - start

        @contextlib.contextmanager
        def stream(other):
            fake.note("side stream")
            yield
            fake.note("main stream")

        class Stream:
            def wait_stream(self, other) -> None:
                fake.note("wait for stream")

        flush = SimpleNamespace(zero_=lambda: fake.note("flush"), max=lambda: fake.note("read"))
        for name, value in {
            "CUDAGraph": Graph, "Event": Event, "graph": graph, "stream": stream, "Stream": Stream,
            "current_stream": Stream, "synchronize": lambda: fake.note("synchronize"),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr("benchmarks.harness.timing._flush_buffer", lambda: flush)

    def note(self, line: str) -> None:
        (self.log if self.capturing is None else self.capturing).append(line)

    def now(self) -> float:
        return self.clock() + self.replayed


class FakeGpu(FakeCuda):
    """A CUDA device for a whole process: tensors that are asked for there lie on the CPU, whose clock times them.

    Its memory's size holds for each tensor alone; what is allocated is what the process has.

    Args:
        memory: the size in bytes.
    """

    def __init__(self, monkeypatch, memory: int) -> None:
        super().__init__(monkeypatch, clock=lambda: time.perf_counter() * 1e3)
        self.memory = self.allowed = memory
        properties = SimpleNamespace(
            name="rehearsal", major=9, minor=0, multi_processor_count=4, total_memory=memory, L2_cache_size=1 << 14
        )
        for name, value in {
            "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
            "get_device_properties": lambda device: properties, "get_device_name": lambda device: properties.name,
            "get_device_capability": lambda device=None: (properties.major, properties.minor),
            "memory_allocated": _resident_bytes, "max_memory_allocated": _most_resident_bytes,
            "reset_peak_memory_stats": lambda: None, "empty_cache": lambda: None,
            "set_per_process_memory_fraction": self.allow, "is_current_stream_capturing": lambda: False,
            "manual_seed_all": lambda seed: None, "set_rng_state": lambda state, device=None: None,
            "get_rng_state": lambda device=None: torch.empty(0, dtype=torch.uint8),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "Generator", _CpuGenerator)
        _OnCpu(self).__enter__()

    def allow(self, fraction: float, device: torch.device) -> None:
        self.allowed = int(fraction * self.memory)

    # what triton asks of its driver to time a call
    def get_device_interface(self):
        return torch.cuda

    def get_empty_cache_for_benchmark(self) -> None:
        return None

    def clear_cache(self, cache: None) -> None:
        self.note("flush")


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def _most_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _CpuGenerator(torch.Generator):
    def __new__(cls, device=None):
        return super().__new__(cls)


class _OnCpu(TorchFunctionMode):
    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        moved = [_cpu_for_cuda(value) for value in args]
        result = func(*moved, **{name: _cpu_for_cuda(value) for name, value in (kwargs or {}).items()})
        if isinstance(result, Tensor) and result.nbytes > self.gpu.allowed:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {result.nbytes} bytes of {self.gpu.allowed}")
        return result


def _cpu_for_cuda(value):
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value
