"""``pytest benchmarks --benchmark-only [--record FILE]``: the device, its clock, and the record of the session."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.harness.record import Entry, Record, environment
from benchmarks.harness.session import dtype_name
from benchmarks.harness.timing import Work, device_clock, sets_beyond_cache
from benchmarks.op.checks import Oracle
from benchmarks.op.peers import Arguments, make_arguments, peer, work
from benchmarks.op.shapes import Shape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 30 if DEVICE.type == "cuda" else 7

Measure = Callable[[str, Shape, torch.dtype, str], None]
Timed = Callable[[Work, Entry], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="write versions, sources and every sample of the session to this file")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=device_clock(DEVICE), disable_gc=True))


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Record | None:
    """The session's record, if one is asked for."""
    path = request.config.getoption("--record")
    return None if path is None else Record(path, environment())


class Inputs:
    """Sets of arguments and their oracle. The last ones are kept, since a shape's peers come one after the other."""

    def __init__(self) -> None:
        self._key: tuple | None = None

    def of(self, shape: Shape, dtype: torch.dtype, variant: str, *, inference: bool) -> tuple[list[Arguments], Oracle]:
        key = (shape, dtype, variant, inference)
        if key != self._key:
            first = make_arguments(shape, dtype, DEVICE, variant, noise=not inference)
            more = range(1, sets_beyond_cache(first, DEVICE))
            self._sets = [first, *(make_arguments(shape, dtype, DEVICE, variant, i, not inference) for i in more)]
            self._oracle = Oracle(first, variant, inference=inference)
            self._key = key
        return self._sets, self._oracle


@pytest.fixture(scope="session")
def inputs() -> Inputs:
    return Inputs()


@pytest.fixture
def timed(benchmark, record: Record | None) -> Timed:
    """``timed(work, entry)``: times the work by the device's clock, and records the samples with the entry's labels."""

    def run(one: Work, entry: Entry) -> None:
        turns = itertools.cycle(range(one.sets))
        benchmark.group = ", ".join(str(value) for name, value in entry.items() if name != "peer")
        benchmark.pedantic(one.run, setup=lambda: ((one.setup(next(turns)),), {}), rounds=ROUNDS, warmup_rounds=2)
        if record is not None:
            method = "events" if DEVICE.type == "cuda" else "host"
            samples = [seconds * 1e6 for seconds in benchmark.stats.stats.data]
            record.add(entry | {"shape": entry["shape"].as_dict(), "method": method, "samples_us": samples})

    return run


@pytest.fixture
def measure(timed: Timed, inputs: Inputs) -> Measure:
    """``measure(peer, shape, dtype, pass)``: checks the result of one of the op's peers, then times the pass."""

    def run(name: str, shape: Shape, dtype: torch.dtype, pass_: str) -> None:
        candidate = peer(name)
        sets, oracle = inputs.of(shape, dtype, candidate.variant, inference=pass_ == "inference")
        oracle.check(candidate)
        group = "decode" if pass_ == "inference" else "op"
        labels = {"group": group, "shape": shape, "dtype": dtype_name(dtype), "pass": pass_, "peer": name}
        timed(work(candidate.call, sets, pass_), labels)

    return run
