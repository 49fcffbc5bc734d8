"""A stand-in for the parts of `torch.cuda` that the timers use: it runs the work at once and notes the order."""

import contextlib
import itertools
from types import SimpleNamespace

import torch


class FakeCuda:
    """``log`` has, in order, what a timer asked of the device; work adds its own lines.

    A graph notes its capture, and each replay does the captured calls' lines again. Events take their time from a clock
    that every line moves on by a microsecond.
    """

    def __init__(self, monkeypatch) -> None:
        self.log: list[str] = []
        self.capturing: list[str] | None = None
        names = itertools.count()
        fake = self

        class Graph:
            def __init__(self) -> None:
                self.name = f"graph {next(names)}"
                self.lines: list[str] = []

            def pool(self):
                return self.name

            def replay(self) -> None:
                fake.note(f"replay {self.name}")
                for line in self.lines:
                    fake.note(line)

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing
                self.at: int | None = None

            def record(self) -> None:
                fake.note("event")
                self.at = len(fake.log)

            def elapsed_time(self, other) -> float:
                assert fake.log[-1] == "synchronize", "an event was read before the device was waited for"
                return (other.at - self.at) / 1e3

        @contextlib.contextmanager
        def graph(captured: Graph, pool=None):
            assert fake.capturing is None
            fake.note(f"capture {captured.name}" + (f" in pool of {pool}" if pool else ""))
            fake.capturing = captured.lines
            yield
            fake.capturing = None

        @contextlib.contextmanager
        def stream(other):
            fake.note("side stream")
            yield
            fake.note("main stream")

        streams = SimpleNamespace(wait_stream=lambda other: fake.note("wait for stream"))
        flush = SimpleNamespace(zero_=lambda: fake.note("flush"), max=lambda: fake.note("read"))
        for name, value in {
            "CUDAGraph": Graph, "Event": Event, "graph": graph, "stream": stream, "Stream": lambda: streams,
            "current_stream": lambda: streams, "synchronize": lambda: fake.note("synchronize"),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr("benchmarks.harness.timing._flush_buffer", lambda: flush)

    def note(self, line: str) -> None:
        (self.log if self.capturing is None else self.capturing).append(line)
