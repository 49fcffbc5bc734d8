"""The op beside its products alone: what they are, who takes turns, and on how many threads."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.record import ROOT, Budget, Record
from benchmarks.models.backbones import CONFIGS
from benchmarks.op.floor import PRODUCTS, Products, measure_products, torch_passes
from benchmarks.op.measure import Session
from benchmarks.op.peers import make_arguments, peer
from benchmarks.op.shapes import CPU_PRODUCTS, Shape, flops
from hycam_kernels.backends.cpu import modulation as cpu_backend

SHAPE = Shape(40, 32, 3, 4)


def test_the_products_are_those_that_the_floor_counts():
    """But for the router's, which are E columns wide, and with N folded already."""
    products = Products(make_arguments(SHAPE, torch.float32, torch.device("cpu")))
    with FlopCounterMode(display=False) as counted:
        products()
    router = 6 * SHAPE.tokens * SHAPE.d * SHAPE.num_experts
    assert counted.get_total_flops() == flops(SHAPE, "both") - router


def test_what_the_page_says_on_paper():
    """Of folding N twice and its two gradients; of a token's weights, and of a step's products a token."""
    page = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    folding = max(
        8 * s.num_experts * s.rank**2 * s.d / (flops(s, "both") - 6 * s.tokens * s.d * s.num_experts)
        for s in CPU_PRODUCTS
    )
    assert f"add on paper at most {100 * folding:.1f} % to the floor's arithmetic" in page
    config, of_token = CONFIGS["SmolLM2-135M"](), Shape(1, 576)
    d, E, r, layers = config.hidden_size, of_token.num_experts, of_token.rank, config.num_hidden_layers
    narrow = d * config.num_key_value_heads // config.num_attention_heads
    bare = layers * (2 * d * (d + narrow) + 3 * d * config.intermediate_size) + config.vocab_size * d
    adapters = layers * (d * d + 2 * E * r * d + E * r * r + E * d)
    assert d == of_token.d
    assert f"a token of SmolLM2-135M reads {1 + adapters / bare:.2f} times the bare model's weights" in page
    # forward, and backward to the activations alone
    added = layers * flops(of_token, "both") / (4 * bare)
    assert f"HyCAM's products add {100 * added:.0f} % to the arithmetic" in page


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
