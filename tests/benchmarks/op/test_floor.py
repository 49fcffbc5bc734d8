"""The op beside its products alone: what they are, who takes turns, and on how many threads."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.record import Budget, Record
from benchmarks.op.floor import PRODUCTS, Products, measure_products, torch_passes
from benchmarks.op.measure import Session
from benchmarks.op.peers import make_arguments, peer
from benchmarks.op.shapes import Shape, flops
from hycam_kernels.backends.cpu import modulation as cpu_backend

SHAPE = Shape(40, 32, 3, 4)


def test_the_products_are_those_that_the_floor_counts():
    """But for the router's, which are E columns wide, and with N folded already."""
    products = Products(make_arguments(SHAPE, torch.float32, torch.device("cpu")))
    with FlopCounterMode(display=False) as counted:
        products()
    router = 6 * SHAPE.tokens * SHAPE.d * SHAPE.num_experts
    assert counted.get_total_flops() == flops(SHAPE, "both") - router


def test_the_torch_passes_are_torch_s(monkeypatch):
    arguments = make_arguments(SHAPE, torch.float32, torch.device("cpu"))
    want = peer("torch").call(arguments)
    monkeypatch.setattr(cpu_backend, "forward", None)
    monkeypatch.setattr(cpu_backend, "backward", None)
    got = torch_passes(arguments)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    (got[0].sum() + got[1]).backward()
    assert arguments["lora_a"].grad.any()


@pytest.mark.parametrize("threads", [1, 2])
def test_measures_in_turn_on_as_many_threads(tmp_path, threads):
    before = torch.get_num_threads()
    session = Session(Record(tmp_path / "r.json", {}), Budget(60), torch.device("cpu"), [], 3)
    measure_products(session, SHAPE, torch.bfloat16, threads, (PRODUCTS, "torch", "torch-passes"), seconds=1)
    found = {entry["peer"]: entry for entry in session.record.entries}
    assert list(found) == [PRODUCTS, "torch", "torch-passes"]
    assert all(len(entry["samples_us"]) == 3 and entry["threads"] == threads for entry in found.values())
    assert {entry["method"] for entry in found.values()} == {"cpu" if threads == 1 else "host"}
    assert torch.get_num_threads() == before
