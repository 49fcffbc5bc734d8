"""A timer that runs the work once and answers with times of its own: all that a test without a GPU replaces."""

import itertools
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness.record import Budget, Record
from benchmarks.harness.session import Session
from benchmarks.harness.timing import Sampler, Work


class CountingTimer:
    """The i-th sample of any work takes i microseconds."""

    method = "count"

    def __init__(self) -> None:
        self.prepared = 0

    def prepare(self, work: Work) -> Sampler:
        self.prepared += 1
        work.run(work.setup(0))
        times = itertools.count(1.0)
        return lambda: next(times)


def make_session(path: Path, *, seconds: float = 60.0, clock: Callable[[], float] = lambda: 0.0, rounds=3) -> Session:
    """A session for which time stands still, unless a clock is given."""
    return Session(Record(path, {"git": None}), Budget(seconds, clock), torch.device("cpu"), [CountingTimer()], rounds)
