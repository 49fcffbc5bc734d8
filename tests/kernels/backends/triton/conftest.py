"""Run the kernel tests on the GPU where there is one, else under triton's interpreter on the CPU.

The variable must be set before triton is imported, so these tests need a pytest process of their own:
``pytest tests/kernels/backends/triton``. ``TRITON_INTERPRET=1`` or ``0`` in the environment overrides the choice.
"""

import os
from pathlib import Path

import pytest
import torch

if "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"
INTERPRETING = os.environ["TRITON_INTERPRET"] == "1"

if INTERPRETING:
    from tests.kernels.backends.triton import interpreter_bfloat16

    interpreter_bfloat16.repair()


@pytest.fixture(scope="session")
def device() -> torch.device:
    from hycam_kernels.backends.triton.modulation import _installation_refusal

    if reason := _installation_refusal():
        pytest.skip(reason)
    from hycam_kernels.backends.triton.kernels.primitives import silu

    if INTERPRETING and type(silu).__name__ != "InterpretedFunction":
        pytest.fail(
            "triton was imported before TRITON_INTERPRET=1 was set: run `pytest tests/kernels/backends/triton` alone"
        )
    return torch.device("cpu" if INTERPRETING else "cuda")


@pytest.fixture
def truncating_products(device, monkeypatch) -> None:
    """Products of tiles are summed as NVIDIA's instructions do: by them on a GPU, emulated in the interpreter."""
    if INTERPRETING:
        from triton.runtime.interpreter import InterpreterBuilder

        from tests.kernels.backends.triton.truncating_products import create_dot

        monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def own_product(device, tmp_path, monkeypatch) -> None:
    """The forward makes the shared product itself: by a table whose rows for it have no limit of choice."""
    from hycam_kernels.backends.triton import modulation as triton_backend
    from hycam_kernels.backends.triton.config_tables import INTERPRETER, drop_limits, family_of, load_table
    from hycam_kernels.backends.triton.tuned_table import table_text

    def forget() -> None:
        load_table.cache_clear()
        triton_backend.launcher.cache_clear()

    family = INTERPRETER if INTERPRETING else family_of(device)
    table = load_table(family)
    rows = drop_limits(table["product_forward"], "candidate", "kept")
    Path(tmp_path, f"{family}.json").write_text(table_text(table | {"product_forward": rows}))
    monkeypatch.setenv("HYCAM_KERNELS_TABLES", str(tmp_path))
    forget()
    yield
    monkeypatch.undo()
    forget()
