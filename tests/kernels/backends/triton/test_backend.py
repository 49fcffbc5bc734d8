"""When the fused backend runs, why it doesn't, and how a configuration is chosen."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from hycam_kernels import explain_backend, hycam_modulation
from hycam_kernels.backends.triton import modulation as triton_backend
from hycam_kernels.backends.triton.config_tables import launch_parameters, select, with_candidates
from tests.kernels.cases import Case


def arguments_on(device: torch.device, case: Case, dtype: torch.dtype = torch.float32) -> dict:
    made = case.make(dtype)
    return {name: value.detach().to(device) if isinstance(value, Tensor) else value for name, value in made.items()}


def test_auto_is_triton_on_cuda_and_torch_elsewhere(device):
    arguments = arguments_on(device, Case((5,), 32, 3, 4))
    told = explain_backend(**arguments)
    if device.type == "cuda":
        assert told.startswith("triton:")
    else:
        assert told.startswith("torch:")
        assert "cpu" in told


REFUSED = {
    "full-rank experts": (Case((5,), 32, 2, experts="full"), torch.float32, "expert_weight"),
    "float64": (Case((5,), 32, 2, 4), torch.float64, "torch.float64"),
    "many experts": (Case((5,), 32, 65, 2), torch.float32, "65 experts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_reason(name, device):
    case, dtype, reason = REFUSED[name]
    arguments = arguments_on(device, case, dtype)
    with pytest.raises(RuntimeError, match=reason):
        hycam_modulation(**arguments, backend="triton")
    if device.type == "cuda":
        assert reason in explain_backend(**arguments)
    assert hycam_modulation(**arguments).hidden_states.isfinite().all()


@pytest.mark.parametrize("name", ["hidden", "attn_output", "residual"])
def test_rows_must_be_dense(name, device):
    arguments = arguments_on(device, Case((5,), 32, 2, 4, residual=True))
    arguments[name] = arguments[name].mT.contiguous().mT
    with pytest.raises(RuntimeError, match=f"{name} has a last stride of 5"):
        hycam_modulation(**arguments, backend="triton")
    assert hycam_modulation(**arguments).hidden_states.isfinite().all()


def test_streams_in_float64_are_refused(device):
    arguments = arguments_on(device, Case((5,), 32, 2, 4))
    arguments["attn_output"] = arguments["attn_output"].double()
    with pytest.raises(RuntimeError, match="attn_output is float64"):
        hycam_modulation(**arguments, backend="triton")


def test_a_cpu_user_needs_no_kernels():
    """Without the interpreter's variable a CPU call imports none of the kernels, and the reason says what is needed."""
    script = """
import sys, torch
import hycam_kernels
h, w = torch.randn(3, 16), torch.randn(16, 16)
hycam_kernels.hycam_modulation(h, h, w, None, None, None, None)
print(any(name.startswith("hycam_kernels.backends.triton.kernels") for name in sys.modules))
try:
    hycam_kernels.hycam_modulation(h, h, w, None, None, None, None, backend="triton")
except RuntimeError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False\n")
    assert "needs a CUDA device, or TRITON_INTERPRET=1" in done.stdout


@pytest.mark.parametrize("version", [None, "3.2.0+git1"])
def test_missing_and_old_triton(version, monkeypatch, device):
    arguments = arguments_on(device, Case((5,), 32, 2, 4))
    if version is None:
        monkeypatch.setitem(sys.modules, "triton", None)
    else:
        monkeypatch.setattr(sys.modules["triton"], "__version__", version)
    triton_backend._triton_version.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="triton is not installed" if version is None else "triton 3.2.0"):
            hycam_modulation(**arguments, backend="triton")
        assert hycam_modulation(**arguments).hidden_states.isfinite().all()
    finally:
        triton_backend._triton_version.cache_clear()


def test_the_first_row_that_takes_the_call_is_chosen():
    table = {
        "kernel": [
            {"dtypes": ["bfloat16"], "max_tokens": 64, "BLOCK": 1},
            {"dtypes": ["bfloat16"], "max_rank": 16, "max_dim": 128, "BLOCK": 2},
            {"max_experts": 4, "BLOCK": 3},
            {"kept": False, "max_experts": 5, "BLOCK": 4},
            {"candidate": True, "BLOCK": 5},
        ]
    }

    def block(dtype=torch.bfloat16, tokens=64, d=128, experts=2, rank=16, kept=True, table=table):
        index = select(table, "kernel", dtype, tokens, d, experts, rank, kept=kept)
        return None if index is None else launch_parameters(table["kernel"][index])

    assert block() == {"BLOCK": 1}
    assert block(tokens=65) == {"BLOCK": 2}
    assert block(tokens=65, rank=17) == {"BLOCK": 3}
    assert block(tokens=65, d=129) == {"BLOCK": 3}
    assert block(dtype=torch.float32) == {"BLOCK": 3}
    assert block(dtype=torch.float32, experts=5) is None
    assert block(dtype=torch.float32, experts=5, kept=False) == {"BLOCK": 4}
    assert block(dtype=torch.float32, experts=6, kept=False) is None
    assert block(dtype=torch.float32, experts=6, kept=False, table=with_candidates(table)) == {"BLOCK": 5}
    assert select(table, "another", torch.float32, 1, 1, 1, 1) is None
