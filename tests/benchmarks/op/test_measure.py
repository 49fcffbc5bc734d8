"""What a run records: every sample, wrong and failing peers without times, floors, and what the budget left out."""

import itertools
import json
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import times_phase
from benchmarks.harness.record import Budget, Record, environment
from benchmarks.harness.session import Session
from benchmarks.harness.timing import HostTimer, Work, alternate
from benchmarks.op import measure
from benchmarks.op.measure import measure_decode_floors, measure_op, measure_rates
from benchmarks.op.peers import Peer, eager, make_arguments, peer
from benchmarks.op.shapes import PASSES, Shape, decode_traffic, floor_us, flops, traffic
from hycam_kernels.backends.torch import modulation as torch_backend
from hycam_kernels.inputs import DIFFERENTIABLE
from hycam_kernels.preparation import prepare
from tests.benchmarks.fakes import CountingTimer, make_session

SHAPE = Shape(40, 32, num_experts=3, rank=8)


def of_peer(session: Session, name: str) -> list[dict]:
    return [entry for entry in session.record.entries if entry.get("peer") == name]


def test_every_sample_is_recorded(tmp_path):
    session = make_session(tmp_path / "r.json")
    measure_op(session, SHAPE, torch.float32, ("eager", "torch"))
    for name in ("eager", "torch"):
        entries = [entry for entry in of_peer(session, name) if entry["group"] == "op"]
        assert [entry["pass"] for entry in entries] == list(PASSES)
        for entry in entries:
            assert entry["samples_us"] == [1.0, 2.0, 3.0]
            assert entry["shape"] == {"tokens": 40, "d": 32, "num_experts": 3, "rank": 8}
            assert (entry["dtype"], entry["method"], entry["beside"]) == ("float32", "count", ["eager", "torch"])
    assert json.loads((tmp_path / "r.json").read_text())["entries"] == session.record.entries


def test_a_wrong_peer_is_not_timed(tmp_path, monkeypatch):
    def wrong(arguments):
        out, balance = eager(arguments)
        return out * 1.1, balance

    monkeypatch.setattr(measure, "peer", lambda name: Peer(name, "paper", wrong) if name == "torch" else peer(name))
    session = make_session(tmp_path / "r.json")
    measure_op(session, SHAPE, torch.float32, ("eager", "torch"))
    (entry,) = of_peer(session, "torch")
    assert "relative error" in entry["wrong"]
    assert "samples_us" not in entry
    assert [entry["group"] for entry in of_peer(session, "eager")] == ["memory", *["op"] * 3]


def test_a_failing_peer_leaves_the_others(tmp_path):
    """The fused backend can't run on a CPU: its reason is recorded."""
    session = make_session(tmp_path / "r.json")
    measure_op(session, SHAPE, torch.float32, ("fused", "torch"))
    (entry,) = of_peer(session, "fused")
    assert "CUDA device" in entry["error"]
    assert [entry["group"] for entry in of_peer(session, "torch")] == ["memory", *["op"] * 3]


def test_what_does_not_fit_the_budget_is_named(tmp_path):
    ticks = itertools.count(0.0, 7.0)
    session = make_session(tmp_path / "r.json", seconds=20, clock=lambda: next(ticks))
    for _ in range(4):
        measure_op(session, SHAPE, torch.float32, ("eager",), seconds=5)
    skipped = [entry for entry in session.record.entries if "skipped" in entry]
    assert skipped
    assert all("needed" in entry["skipped"] and "samples_us" not in entry for entry in skipped)
    assert [entry for entry in session.record.entries if "samples_us" in entry]


def test_turns_end_with_the_budget_but_after_one():
    order: list[str] = []
    samplers = {name: lambda name=name: order.append(name) or 1.0 for name in "ab"}
    samples = alternate(samplers, 5, iter([True, False]).__next__)
    assert order == ["a", "b", "a", "b"]
    assert samples == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_host_timer_counts_the_run_alone():
    seen = []
    work = Work(lambda i: seen.append(i) or time.sleep(0.05), lambda state: time.sleep(0.002), sets=3)
    sample = HostTimer(warmup=1).prepare(work)
    assert 2_000 <= min(sample() for _ in range(5)) < 45_000
    assert seen == [0, 1, 2, 0, 1, 2]


def test_cpu_time_does_not_count_waiting():
    sample = HostTimer(warmup=0, cpu_time=True).prepare(Work(lambda i: i, lambda state: time.sleep(0.05), sets=1))
    assert sample() < 25_000


def test_memory_is_that_of_the_derivation(tmp_path):
    """The op keeps S, V and the routing; plain autograd more than six times that."""
    session = make_session(tmp_path / "r.json")
    shape = Shape(256, 64, num_experts=3, rank=8)
    measure_op(session, shape, torch.bfloat16, ("torch", "torch-recompute", "eager"), passes=())
    kept = {entry["peer"]: entry["kept_bytes"] for entry in session.record.entries}
    activation = 256 * 64 * 2
    routing = 2 * 256 * 3 * 4 + 2 * 3 * 4  # logits, p, and the two means
    assert session.record.entries[0]["activation_bytes"] == activation
    assert kept["torch"] == activation + 256 * 24 * 2 + routing
    assert kept["torch-recompute"] == routing
    assert kept["eager"] > 6 * kept["torch"]


def test_floors_are_counted_and_scaled_by_the_measured_rates(tmp_path):
    session = make_session(tmp_path / "r.json")
    measure_rates(session, torch.bfloat16, [SHAPE], copy_bytes=1 << 10)
    copy, product, *floors = session.record.entries
    assert (copy["amount"], product["amount"]) == (2048, 2 * 40 * 32 * 32)
    assert copy["per_second"] == pytest.approx(2048 / 2e-6)
    for entry, pass_ in zip(floors, PASSES, strict=True):
        want = max(entry["flops"] / product["per_second"], entry["bytes"] / copy["per_second"]) * 1e6
        assert entry["pass"] == pass_
        assert entry["floor_us"] == pytest.approx(want)
    measure_decode_floors(session, torch.bfloat16, [Shape(1, 32, 3, 8)])
    assert session.record.entries[-1]["floor_us"] == pytest.approx(decode_traffic(Shape(1, 32, 3, 8)) / 2048 * 2)


def test_arithmetic_and_traffic_are_those_on_paper():
    """GFLOP and MB of the design's table at T = 8192, d = 4096."""
    shape = Shape(8192, 4096)
    assert [round(flops(shape, pass_) / 1e9) for pass_ in PASSES] == [318, 658, 976]
    assert [round(traffic(shape, pass_) / 1e6) for pass_ in PASSES] == [313, 486, 798]
    assert round(decode_traffic(Shape(1, 4096)) / 1e6, 1) == 38.9
    assert floor_us(790, 1, 790e6, 1e6) == pytest.approx(1.0)
    assert floor_us(1, 43, 790e6, 4.3e6) == pytest.approx(10.0)


def test_flops_are_those_of_the_products():
    """Against torch's own counter on the torch backend, whose products are all needed; folding N into A adds to it."""
    shape = Shape(512, 64, num_experts=3, rank=16)
    arguments = make_arguments(shape, torch.float32, torch.device("cpu"))
    del arguments["gumbel"]
    x = prepare(**arguments)
    fold = 2 * 3 * 16 * 16 * 64
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out, load, router_prob, saved = torch_backend.forward(x)
    assert counter.get_total_flops() == flops(shape, "forward") + fold
    needs = [getattr(x, name) is not None for name in DIFFERENTIABLE]
    # the counter knows addmm, but not in place
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **options: 2 * a[0] * a[1] * b[1]}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        torch_backend.backward(out, load, router_prob, x, saved, needs)
    assert counter.get_total_flops() == flops(shape, "backward") + 3 * fold


def test_times_phase_covers_every_group_on_any_device(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.COMPILE_SECONDS", {})
    session = make_session(tmp_path / "r.json")
    times_phase(session, [SHAPE], [Shape(1, 32, 3, 8)], dtype=torch.float32, copy_bytes=1 << 10)
    groups = {entry["group"] for entry in session.record.entries if "error" not in entry}
    assert groups == {"rate", "floor", "op", "memory", "decode", "overhead"}
    decode = [entry for entry in session.record.entries if entry["group"] == "decode" and "samples_us" in entry]
    assert [(entry["peer"], entry["pass"]) for entry in decode] == [("eager", "inference"), ("torch", "inference")]


def test_a_record_is_whole_after_each_entry(tmp_path):
    record = Record(tmp_path / "deep" / "r.json", {"time": "now"})
    for index in range(3):
        record.add({"group": "x", "i": index})
        assert len(json.loads(record.path.read_text())["entries"]) == index + 1
    assert list(record.path.parent.iterdir()) == [record.path]


def test_a_record_goes_on_where_it_was_left(tmp_path):
    record = Record(tmp_path / "r.json", {"time": "now", "gpu": {"name": "x"}})
    record.write()
    assert Record.read(record.path).content == {"time": "now", "gpu": {"name": "x"}, "entries": []}
    record.add({"group": "x", "samples_us": [1.5, 2.0]})
    again = Record.read(record.path)
    again.labels = {"phase": "times"}
    again.add({"group": "y"})
    assert Record.read(record.path).content == record.content | {
        "entries": [{"group": "x", "samples_us": [1.5, 2.0]}, {"group": "y", "phase": "times"}]
    }
    # readable: an entry a line
    assert len(record.path.read_text().splitlines()) == 10


def test_environment_names_machine_versions_and_sources():
    found = environment()
    assert found["packages"]["torch"] == torch.__version__
    assert len(found["git"]["commit"]) == 40
    assert isinstance(found["git"]["dirty"], bool)
    assert found["gpu"] is None or found["gpu"]["name"]
    assert environment("abc")["git"] == {"commit": "abc", "dirty": False}
    assert environment("abc+")["git"] == {"commit": "abc", "dirty": True}


def test_budget_runs_down():
    times = iter([10.0, 11.0, 14.0])
    budget = Budget(3, clock=times.__next__)
    assert budget.lasts()
    assert not budget.lasts()


def test_counting_timer_runs_the_work():
    ran = []
    CountingTimer().prepare(Work(lambda i: i, ran.append, 1))
    assert ran == [0]
