"""The CUDA timers' order of steps, on a stand-in for the device: nothing but the work lies between the events."""

import pytest

from benchmarks.harness.timing import EventTimer, GraphTimer, Work
from tests.benchmarks.fake_cuda import FakeCuda


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def make_work(cuda: FakeCuda, sets: int, *, on_device: bool = False) -> Work:
    def setup(index: int) -> int:
        cuda.note(f"setup {index}")
        return index

    return Work(setup, lambda index: cuda.note(f"run {index}"), sets, on_device=on_device)


def taken(cuda: FakeCuda, sample) -> tuple[float, list[str]]:
    cuda.log.clear()
    time = sample()
    return time, list(cuda.log)


def test_events_surround_the_run_on_an_idle_device(cuda):
    sample = EventTimer(warmup=1).prepare(make_work(cuda, 2))
    time, log = taken(cuda, sample)
    assert log == ["setup 1", "synchronize", "event", "run 1", "event", "synchronize"]
    assert time == pytest.approx(2.0)  # the run and the second event
    assert taken(cuda, sample)[1][0] == "setup 0"


def test_a_graph_is_replayed_behind_a_flush(cuda):
    sample = GraphTimer(warmup=2).prepare(make_work(cuda, 2))
    logs = [taken(cuda, sample)[1] for _ in range(3)]
    assert logs[0] == ["flush", "read", "event", "replay graph 0", "run 0", "event", "synchronize"]
    assert logs[1] == ["flush", "read", "event", "replay graph 1", "run 1", "event", "synchronize"]
    assert logs[2] == logs[0]


def test_work_warms_up_on_a_side_stream_before_it_is_captured(cuda):
    GraphTimer(warmup=2).prepare(make_work(cuda, 1))
    warm = [
        "wait for stream", "side stream", "setup 0", "run 0", "setup 0", "run 0", "main stream", "wait for stream",
        "synchronize",
    ]  # fmt: skip
    assert cuda.log[: len(warm)] == warm
    assert cuda.log[len(warm) : len(warm) + 2] == ["setup 0", "capture graph 0"]


def test_a_setup_on_the_device_is_replayed_before_the_events(cuda):
    """A backward's forward: captured apart, in a pool that both share, and not timed."""
    sample = GraphTimer(warmup=1).prepare(make_work(cuda, 1, on_device=True))
    assert [line for line in cuda.log if line.startswith("capture")] == [
        "capture graph 0", "capture graph 1 in pool of graph 0",
    ]  # fmt: skip
    time, log = taken(cuda, sample)
    assert log == [
        "replay graph 0", "setup 0", "flush", "read", "event", "replay graph 1", "run 0", "event", "synchronize",
    ]  # fmt: skip
    assert time == pytest.approx(3.0)


def test_a_chain_runs_several_sets_and_divides(cuda):
    sample = GraphTimer(warmup=1, chain=2).prepare(make_work(cuda, 4))
    time, log = taken(cuda, sample)
    assert log[3:6] == ["replay graph 0", "run 0", "run 1"]
    assert taken(cuda, sample)[1][3:6] == ["replay graph 1", "run 2", "run 3"]
    assert time == pytest.approx(4.0 / 2)
