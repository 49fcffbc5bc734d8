"""`pytest benchmarks --benchmark-only` in a process of its own: it measures, checks first, and records."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.harness.record import ROOT
from benchmarks.op.shapes import CPU_QUICK


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA it takes the real shapes")
def test_suite_measures_and_records(tmp_path):
    record = tmp_path / "r.json"
    tests = [f"test_op[{CPU_QUICK}-float32-both-{peer}]" for peer in ("eager", "torch")]
    tests.append(f"test_kept_for_backward[{CPU_QUICK}-float32-torch-eager]")
    command = [sys.executable, "-m", "pytest", "--benchmark-only", "-q", "-p", "no:cacheprovider", "--record", record]
    command += [f"benchmarks/test_op.py::{test}" for test in tests]
    # a run inside a worker of pytest-xdist would not measure
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout
    assert "3 passed" in result.stdout
    content = json.loads(record.read_text())
    assert content["packages"]["torch"] == torch.__version__
    timed = {entry["peer"]: entry for entry in content["entries"] if entry["group"] == "op"}
    assert set(timed) == {"eager", "torch"}
    assert all(len(entry["samples_us"]) == 7 and min(entry["samples_us"]) > 100 for entry in timed.values())
    kept = {entry["peer"]: entry["kept_bytes"] for entry in content["entries"] if entry["group"] == "memory"}
    assert 0 < kept["torch"] <= 0.6 * kept["eager"]
