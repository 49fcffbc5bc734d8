"""`python -m hycam_kernels.aot`: what ships builds without spills for every target. No GPU is needed."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
KERNELS = {"router_kernel", "token_mean_kernel", "b_grad_kernel", "router_backward_kernel", "router_weight_grad_kernel"}
# the two forms of the forward, of which every table has the second as a candidate where S is not kept
KERNELS |= {"fusion_forward_kernel", "product_forward_kernel"}
# the two structures of the backward: in one pass where registers allow, which AMD's tables don't offer, or split
ROW = {"row_grad_kernel"}
SPLIT = {"stream_grad_kernel", "v_grad_kernel"}
# those of decoding and of the norm's projection
OTHER_KERNELS = {"decode_down_kernel", "decode_fusion_kernel", "norm_projection_kernel", "norm_backward_kernel"}


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """The interpreter of this process can't compile: a process of its own, without the variable."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


# one call's kernels, by the parts of the command
ONE_CALL = """
import json, sys, torch
from hycam_kernels import aot
target, released = sys.argv[1:]
options = {"released": released == "True"}
aot._calls = lambda: iter([aot._call(2400, 64, torch.bfloat16, **options, keep=keep) for keep in (True, False)])
rows = [aot.build(launch, target) for launch in aot.record(target).launches]
print(json.dumps([row | {"fault": aot.fault(row)} for row in rows]))
"""


@pytest.mark.parametrize(
    ("target", "released", "backward", "mma"),
    [("sm_90", False, ROW, {"row_grad_kernel": "HMMA"}), ("gfx942", True, SPLIT, dict.fromkeys(SPLIT, "MFMA"))],
)
def test_one_call_builds_without_spills(target, released, backward, mma):
    """The paper's op on the main target, with warp-group products where 64 rows fit; the released code's on AMD."""
    done = run_python("-c", ONE_CALL, target, str(released))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["kernel"]: row for row in json.loads(done.stdout)}
    assert rows.keys() == KERNELS | backward
    assert not [row for row in rows.values() if row["fault"]]
    large = "HGMMA" if target == "sm_90" else "MFMA"
    forms = {"fusion_forward_kernel": large, "product_forward_kernel": large}
    for kernel, wanted in (forms | {"b_grad_kernel": large} | mma).items():
        assert rows[kernel]["mma"] == wanted, kernel


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", TARGETS)
def test_every_shipped_configuration_builds_without_spills(target, tmp_path):
    done = run_python("-m", "hycam_kernels.aot", "--targets", target, "--json", str(tmp_path / "builds.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "builds.json").read_text())
    row_kernels = ROW if target.startswith("sm_") else set()
    assert {row["kernel"] for row in rows} == KERNELS | SPLIT | row_kernels | OTHER_KERNELS
    for row in rows:
        assert set(row) == {"kernel", "target", "config", "registers", "spill_bytes", "shared_bytes", "mma"}
        assert row["target"] == target
        assert row["registers"] > 0
        assert row["spill_bytes"] == 0


def test_a_bad_configuration_is_found(tmp_path):
    """Tiles that spill, that need too much shared memory and that don't compile: each is named, exit status 1."""
    script = """
import sys, torch
from hycam_kernels import aot
from hycam_kernels.kernels import tables
aot._calls = lambda: iter([aot._call(2400, 64, torch.bfloat16)])
table = tables.load_table("sm_90")
warps = {"num_warps": 4, "num_stages": 2}
table["row_grad"] = []
table["fusion_forward"] = [{"BLOCK_T": 128, "BLOCK_D": 256, "BLOCK_R": 16, **warps}]
table["router"] = [{"BLOCK_T": 128, "BLOCK_D": 512, "num_warps": 8, "num_stages": 3}]
table["v_grad"] = [{"BLOCK_T": 48, "BLOCK_D": 64, "BLOCK_R": 64, "SPLITS": 1, **warps}]
table["stream_grad"] = table["b_grad"] = [{"BLOCK_T": 16, "BLOCK_D": 16, "BLOCK_R": 16, "SPLITS": 1, **warps}]
sys.exit(aot.main(["--targets", "sm_90"]))
"""
    done = run_python("-c", script)
    assert done.returncode == 1, done.stdout + done.stderr
    faults = done.stderr.splitlines()
    assert any("fusion_forward_kernel" in line and "spills" in line for line in faults), done.stderr
    assert any("router_kernel" in line and "shared memory" in line for line in faults), done.stderr
    assert any("v_grad_kernel" in line and "Error" in line for line in faults), done.stderr


def test_arguments():
    unknown = run_python("-m", "hycam_kernels.aot", "--targets", "sm_20")
    assert unknown.returncode == 2
    assert "sm_20" in unknown.stderr
    interpreting = run_python("-m", "hycam_kernels.aot", TRITON_INTERPRET="1")
    assert interpreting.returncode == 2
    assert "TRITON_INTERPRET" in interpreting.stderr


def test_every_target_has_a_table():
    from hycam_kernels.kernels.tables import families, family_of_capability

    assert families() == sorted(TARGETS)
    newest = {(8, 0): "sm_80", (8, 7): "sm_86", (9, 0): "sm_90", (10, 3): "sm_100", (12, 1): "sm_120"}
    assert {capability: family_of_capability(*capability) for capability in newest} == newest
    assert family_of_capability(7, 5) is None
