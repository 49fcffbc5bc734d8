"""Run the kernel tests on the GPU where there is one, else under triton's interpreter on the CPU.

The variable must be set before triton is imported, so these tests need a pytest process of their own:
``pytest tests/kernels/triton``. ``TRITON_INTERPRET=1`` or ``0`` in the environment overrides the choice.
"""

import os
import sys

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
    return torch.device("cpu" if INTERPRETING else "cuda")


def pytest_collection_modifyitems(items):
    if INTERPRETING and isinstance(sys.modules["triton"].jit(_identity), sys.modules["triton"].JITFunction):
        raise pytest.UsageError("triton was imported without TRITON_INTERPRET=1: run `pytest tests/kernels/triton` alone")


def _identity(x):
    return x
