"""Liger's kernels in an adapted backbone, by triton's interpreter: the loss and the adapter's gradients stay."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("liger_kernel")
# Before 3.7 the interpreter hands kernels plain floats; Liger 0.8's RMSNorm casts one as a tensor.
pytest.importorskip("triton", minversion="3.7")

# Liger replaces functions of transformers, and triton reads at its import whether it interprets.
_CODE = """
import torch
from transformers.integrations.liger import apply_liger_kernel
from tests.adapter.builders import adapted_model, batch, gradients, largest_error

def step(liger):
    model = adapted_model(noise="never")
    if liger:
        apply_liger_kernel(model, None)
        assert "liger" in model.get_base_model().model.norm.forward.__module__
    outputs = model(**batch())
    outputs.loss.backward()
    return outputs, gradients(model)

(plain, wanted), (fast, found) = step(False), step(True)
assert plain.logits is not None and fast.logits is None
print(abs(plain.loss.item() - fast.loss.item()), largest_error(found, wanted))
"""


def test_the_loss_and_the_gradients_stay():
    variables = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _CODE],
        capture_output=True, text=True, env=os.environ | variables, cwd=Path(__file__).parents[2], timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loss, gradient = map(float, done.stdout.split()[-2:])
    assert loss < 1e-5
    assert gradient < 1e-4
