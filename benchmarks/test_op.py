"""The op's passes by peer, decode, and bytes kept for the backward: real shapes on CUDA, a small one on a CPU."""

import pytest
import torch

from benchmarks.conftest import DEVICE
from benchmarks.harness.memory import kept_bytes
from benchmarks.harness.session import dtype_name
from benchmarks.op.peers import make_arguments, peer
from benchmarks.op.shapes import CPU_DECODE, CPU_QUICK, DECODE, PASSES, TRAINING

ON_CUDA = DEVICE.type == "cuda"
SHAPES = TRAINING if ON_CUDA else (CPU_QUICK,)
DTYPES = (torch.bfloat16,) if ON_CUDA else (torch.float32, torch.bfloat16)
PAPER_PEERS = ("eager", "compile", "torch", "fused", "fused-recompute") if ON_CUDA else ("eager", "torch")
RELEASED_PEERS = ("released", "fused-released") if ON_CUDA else ("released", "torch-released")
# what the op may keep, in bytes that plain autograd keeps for the same result
KEPT_SHARE = 0.6


@pytest.mark.parametrize("name", PAPER_PEERS)
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_op(shape, dtype, pass_, name, measure):
    measure(name, shape, dtype, pass_)


@pytest.mark.parametrize("name", RELEASED_PEERS)
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_released_op(shape, dtype, pass_, name, measure):
    measure(name, shape, dtype, pass_)


@pytest.mark.parametrize("name", ("eager", "torch", "fused") if ON_CUDA else ("eager", "torch"))
@pytest.mark.parametrize("shape", DECODE if ON_CUDA else CPU_DECODE, ids=str)
def test_decode(shape, name, measure):
    measure(name, shape, DTYPES[0], "inference")


@pytest.mark.parametrize(("ours", "theirs"), [("torch", "eager"), ("torch-released", "released")])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kept_for_backward(shape, dtype, ours, theirs, benchmark, record):
    """Bytes that autograd keeps; the time is that of a forward whose saved tensors are counted."""
    kept = {}
    for name in (theirs, ours):
        candidate = peer(name)
        arguments = make_arguments(shape, dtype, DEVICE, candidate.variant)
        kept[name] = kept_bytes(candidate.call, arguments)
        if record is not None:
            record.add(
                {"group": "memory", "shape": shape.as_dict(), "dtype": dtype_name(dtype), "peer": name,
                 "kept_bytes": kept[name], "activation_bytes": arguments["hidden"].nbytes}
            )  # fmt: skip
    benchmark.group = f"kept for the backward, {shape}, {dtype_name(dtype)}"
    benchmark.extra_info |= kept
    benchmark.pedantic(kept_bytes, args=(peer(ours).call, arguments), rounds=3, warmup_rounds=1)
    assert kept[ours] <= KEPT_SHARE * kept[theirs], kept
