"""What a call launches, on tensors without data."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.machine.calls import OperationLog
from hycam_kernels.backends.triton import modulation
from hycam_kernels.backends.triton.offline_builds import Recorder
from hycam_kernels.backends.triton.offline_calls import training_call
from hycam_kernels.inputs import DIFFERENTIABLE

WEIGHTS = ("shared_weight", "lora_a", "lora_n", "lora_b", "router_weight")
T, d, E, r = 512, 128, 5, 16


def operations(weight_dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], OperationLog]:
    """Gradients by name, and the library's operations of the backward pass of a bfloat16 call."""
    x = training_call(T, r, torch.bfloat16, d=d)
    x = x._replace(**{name: getattr(x, name).to(weight_dtype) for name in WEIGHTS})
    recorder = Recorder("sm_90")
    out, load, router_prob, saved = modulation.forward(x, recorder)
    needs = [getattr(x, name) is not None for name in DIFFERENTIABLE]
    with OperationLog() as log:
        grads = modulation.backward(out, load, router_prob, x, saved, needs, recorder)
    return dict(zip(DIFFERENTIABLE, grads, strict=True)), log


def test_float32_weights_get_gradients_that_nothing_rounded():
    """The library writes them in float32: what is copied to another dtype are weights for their products alone."""
    grads, log = operations(torch.float32)
    assert all(grads[name].dtype == torch.float32 for name in WEIGHTS)
    copies = [operation for operation in log.operations if operation.name == "_to_copy"]
    of_weights = {(4 + 2) * count for count in (d * d, E * r * d, E * d * r, E * d)}
    assert copies
    assert {operation.bytes for operation in copies} <= of_weights
    assert sum(operation.bytes == (4 + 2) * d * d for operation in copies) == 1


def test_bfloat16_weights_are_copied_nowhere():
    grads, log = operations(torch.bfloat16)
    assert all(grads[name].dtype == torch.bfloat16 for name in WEIGHTS)
    assert not [operation.name for operation in log.operations if operation.name == "_to_copy"]
    assert "zeros" not in {operation.name for operation in log.operations}
