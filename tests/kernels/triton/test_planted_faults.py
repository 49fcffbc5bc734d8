"""The tests of the kernels can fail: each planted fault makes one of them do so."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FORWARD, BACKWARD, ROUTER, SHARED = (
    f"hycam_kernels/kernels/{name}.py" for name in ("fusion_forward", "fusion_backward_kernels", "router", "primitives")
)
# what a planted fault breaks: (file, the code, the fault)
FAULTS = {
    "fusion forward: no column mask": (FORWARD, "col_mask = cols < d\n", "col_mask = cols < d + 8\n"),
    "fusion forward: no row mask": (FORWARD, "row_mask = rows < tokens\n", "row_mask = rows < tokens + 1\n"),
    "fusion forward: last expert dropped": (FORWARD, "range(0, NUM_EXPERTS,", "range(0, NUM_EXPERTS - 1,"),
    "fusion forward: residual not added": (FORWARD, "stream += load_tile", "load_tile"),
    "expert tile: scale dropped": (SHARED, "return z * scale", "return z"),
    "expert tile: rank mask dropped": (
        SHARED,
        "row_mask[:, None] & (ranks < RANK)",
        "row_mask[:, None] & (ranks < 999)",
    ),
    "expert tile: last rank block dropped": (SHARED, "range(0, RANK, BLOCK_R,", "range(0, RANK - BLOCK_R, BLOCK_R,"),
    "hard routing: last of a tie": (ROUTER, "tl.argmax(p, 1)", "tl.argmax(p, 1, tie_break_left=False)"),
    "stream grad: SiLU' without its second term": (SHARED, "gate + activation * (1.0 - gate)", "gate"),
    "stream grad: upstream dropped": (BACKWARD, "(grad + through_stream)", "through_stream"),
    "stream grad: p's gradient weighted": (
        BACKWARD,
        "tl.sum(d_fusion * activation, 1)",
        "tl.sum(grad * activation, 1)",
    ),
    "stream grad: column block ignored": (BACKWARD, "column_block.to(tl.int64) * tokens + rows", "rows"),
    "row grad: last expert dropped": (
        BACKWARD,
        "fusion += weight[:, None] * activation\n            next_d_p",
        "fusion += weight[:, None] * activation * (expert < NUM_EXPERTS - 1)\n            next_d_p",
    ),
    "row grad: V's scale dropped": (BACKWARD, "(weight * scale)[:, None]", "weight[:, None]"),
    "row grad: p's sum of one block": (BACKWARD, "d_p[expert] + tl.sum", "tl.sum"),
    "v grad: split end ignored": (BACKWARD, "tl.minimum((split + 1) * columns, d)", "d"),
    "v grad: weight dropped": (
        BACKWARD,
        "d_z = grad * stream * weight[:, None] * silu",
        "d_z = grad * stream * silu",
    ),
    "v grad: bias dropped": (BACKWARD, "load_expert_bias(lora_b_bias, expert, cols, col_mask, d)[None, :]", "0"),
    "b grad: token mask of the tail dropped": (BACKWARD, "row_mask = rows < end\n", "row_mask = rows < end + 1\n"),
    "b grad: bias sum of one block": (BACKWARD, "d_bias += tl.sum(d_z, 1)", "d_bias = tl.sum(d_z, 1)"),
    "b grad: bias dropped": (BACKWARD, "load_expert_bias(lora_b_bias, expert, cols, col_mask, d)[:, None]", "0"),
    "router: noise counter": (ROUTER, "rows[:, None] * NUM_EXPERTS +", "rows[:, None] * 16 +"),
    "router: temperature dropped": (ROUTER, "softmax_rows(noisy / tau,", "softmax_rows(noisy,"),
    "router: bias dropped": (ROUTER, "logit += tl.load(bias", "tl.load(bias"),
    "router: token mask ignored": (ROUTER, "counted = tl.load(token_mask", "tl.load(token_mask"),
    "token mean: second expert row": (ROUTER, "partial_sums + NUM_EXPERTS + offsets", "partial_sums + offsets"),
    "token mean: divided by all tokens": (ROUTER, "return tl.load(count).to(tl.float32)", "return 1.0 * 77"),
    "router backward: one partial sum": (ROUTER, "for _ in range(partials):", "for _ in range(1):"),
    "router backward: tau dropped": (ROUTER, "tl.sum(d_p * p, 1)[:, None]) / tau", "tl.sum(d_p * p, 1)[:, None])"),
    "router backward: q's term dropped": (ROUTER, "d_logit += q * (", "q * ("),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_fails_a_test(name, tmp_path):
    shutil.copytree(ROOT / "hycam_kernels", tmp_path / "hycam_kernels")
    shutil.copytree(ROOT / "tests" / "kernels", tmp_path / "tests" / "kernels")
    for file in ("tests/__init__.py", "tests/conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / file, tmp_path / file)
    path, code, fault = FAULTS[name]
    source = (tmp_path / path).read_text()
    assert source.count(code) >= 1, code
    (tmp_path / path).write_text(source.replace(code, fault))
    # those in guarded memory first: elsewhere a stray write may end the process
    for tests in (["test_modulation.py", "-k", "memory"], ["test_kernels.py"], ["test_modulation.py"]):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests],
            cwd=tmp_path / "tests" / "kernels" / "triton",
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
        )
        if done.returncode:
            break
    assert done.returncode == 1, done.stdout[-2000:]
    assert "1 failed" in done.stdout
