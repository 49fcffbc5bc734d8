"""Run the kernel tests on the GPU where there is one, else under triton's interpreter on the CPU.

The variable must be set before triton is imported, so these tests need a pytest process of their own:
``pytest tests/kernels/triton``. ``TRITON_INTERPRET=1`` or ``0`` in the environment overrides the choice.
"""

import os

import pytest
import torch

if "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"
INTERPRETING = os.environ["TRITON_INTERPRET"] == "1"

if INTERPRETING:
    from tests.kernels.triton import interpreter_bfloat16

    interpreter_bfloat16.repair()


@pytest.fixture(scope="session")
def device() -> torch.device:
    from hycam_kernels.kernels.primitives import sigmoid

    if INTERPRETING and type(sigmoid).__name__ != "InterpretedFunction":
        pytest.fail("triton was imported before TRITON_INTERPRET=1 was set: run `pytest tests/kernels/triton` alone")
    return torch.device("cpu" if INTERPRETING else "cuda")
