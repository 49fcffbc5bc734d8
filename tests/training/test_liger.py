"""Liger's rope and loss in an adapted backbone, by triton's interpreter: loss and adapter's gradients stay."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("liger_kernel")
pytest.importorskip("triton", minversion="3.6")  # the interpreter of 3.2 takes no argument that is None

# Liger replaces functions of transformers, and triton reads at its import whether it interprets.
_CODE = """
import torch
from transformers.integrations.liger import apply_liger_kernel
from tests.adapter.builders import adapted_model, batch, gradients, largest_error

def step(liger):
    model = adapted_model(noise="never")
    if liger:
        # Liger 0.8.5's others cast numbers, which the interpreter hands them as Python's floats
        apply_liger_kernel(model, {"rms_norm": False, "swiglu": False})
        assert "liger" in model.get_base_model().forward.__module__
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
