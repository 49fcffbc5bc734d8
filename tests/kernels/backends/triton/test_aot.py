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
KERNELS |= {"fusion_forward_kernel", "product_forward_kernel", "sum_parts_kernel"}
# the two structures of the backward: in one pass, or split; these targets' tables have the second alone
ROW = {"row_grad_kernel"}
ONLY_SPLIT = ("sm_90", "gfx942")
SPLIT = {"stream_grad_kernel", "v_grad_kernel"}
# those of decoding and of the norm's projection
OTHER_KERNELS = {"decode_down_kernel", "decode_fusion_kernel", "norm_projection_kernel", "norm_backward_kernel"}


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """The interpreter of this process can't compile: a process of its own, without the variable."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


# what sm_90 multiplies without warp-group products, whose tiles have 64 rows: tiles of 16 or 32 rows, or columns
NARROW = {"row_grad_kernel", "router_weight_grad_kernel"}
LARGE = KERNELS & {"fusion_forward_kernel", "product_forward_kernel", "b_grad_kernel"} | SPLIT


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("every_call", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", TARGETS)
def test_what_ships_builds_without_spills(target, every_call, tmp_path):
    """Each configuration in the call with the most tensors, or in every call; products by the target's instructions."""
    arguments = [] if every_call else ["--once"]
    done = run_python(
        "-m", "hycam_kernels.aot", "--targets", target, *arguments, "--json", str(tmp_path / "builds.json")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "builds.json").read_text())
    row_kernels = set() if target in ONLY_SPLIT else ROW
    assert {row["kernel"] for row in rows} == KERNELS | SPLIT | row_kernels | OTHER_KERNELS
    instruction = {"gfx942": "MFMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(target, "HMMA")
    for row in rows:
        assert set(row) == {"kernel", "target", "config", "registers", "spill_bytes", "shared_bytes", "mma"}
        assert row["target"] == target
        assert row["registers"] > 0
        assert row["spill_bytes"] == 0
        if row["config"]["dtype"] != "fp32" and row["config"].get("NUM_EXPERTS"):
            if row["kernel"] in LARGE:
                assert row["mma"] == instruction, row
            elif row["kernel"] in NARROW:
                assert row["mma"] == ("MFMA" if target == "gfx942" else "HMMA"), row


def test_each_configuration_is_built_in_its_hungriest_call():
    """Every row of the table but those that differ in the grid alone; the released code's call where there are two."""
    script = """
from hycam_kernels.backends.triton import offline_builds
launches = list(offline_builds.record("sm_80").launches)
chosen = {launch.configuration(): launch for launch in offline_builds.one_of_each_configuration(launches)}
assert chosen.keys() == {launch.configuration() for launch in launches}
assert len(chosen) < len(launches) / 2
for launch in launches:
    assert len(chosen[launch.configuration()].absent) <= len(launch.absent)
(row_grad,) = (launch for launch in chosen.values() if launch.name == "row_grad_kernel" and launch.dtype == "bf16")
assert not row_grad.absent
"""
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr


def test_a_build_has_one_place_in_triton_s_cache():
    """Whatever the order of a set in this process: a second run compiles nothing."""
    script = """
import triton
from hycam_kernels.backends.triton import offline_builds

class Compiled(Exception):
    pass

def compile(source, **options):
    raise Compiled(source.hash())

triton.compile = compile
launch = next(launch for launch in offline_builds.record("sm_90").launches if launch.name == "fusion_forward_kernel")
try:
    offline_builds.build(launch, "sm_90")
except Compiled as place:
    print(place)
"""
    first, second = (run_python("-c", script, PYTHONHASHSEED=seed) for seed in ("1", "2"))
    assert first.returncode == 0, first.stderr
    assert len(first.stdout) > 40
    assert first.stdout == second.stdout


def test_blocks_of_the_logits_are_summed_apart():
    """The block's product starts at 0: of a plain sum the compiler makes the product's accumulator."""
    script = r"""
import re, triton
from hycam_kernels.backends.triton import offline_builds
compiled, compile = [], triton.compile
triton.compile = lambda *arguments, **options: compiled.append(compile(*arguments, **options)) or compiled[-1]
for launch in offline_builds.one_of_each_configuration(offline_builds.record("sm_90").launches):
    if launch.name in ("router_kernel", "decode_down_kernel") and launch.dtype == "bf16":
        offline_builds.build(launch, "sm_90")
        apart = re.findall(r"tt\.dot %\S+, %\S+, (%\S+) .*maxNumImpreciseAcc", compiled[-1].asm["ttir"])
        assert len(apart) == 1 and apart[0].startswith("%cst"), (launch, apart)
assert len(compiled) > 3
"""
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr


def test_a_bad_configuration_is_found(tmp_path):
    """Tiles that spill, that need too much shared memory and that don't compile: each is named, exit status 1."""
    script = """
import sys, torch
from hycam_kernels import aot
from hycam_kernels.backends.triton import config_tables as tables, offline_builds
from hycam_kernels.backends.triton.offline_calls import training_call
offline_builds.calls = lambda: iter([training_call(2400, 64, torch.bfloat16)])
table = tables.load_table("sm_90")
warps = {"num_warps": 4, "num_stages": 2}
table["row_grad"] = []
table["fusion_forward"] = [{"BLOCK_T": 128, "BLOCK_D": 256, "BLOCK_R": 16, **warps}]
table["router"] = [{"BLOCK_T": 128, "BLOCK_D": 512, "num_warps": 8, "num_stages": 3}]
table["v_grad"] = [{"BLOCK_T": 48, "BLOCK_D": 64, "BLOCK_R": 64, "EXPERTS": 1, "SPLITS": 1, **warps}]
table["stream_grad"] = [{"BLOCK_T": 16, "BLOCK_D": 16, "BLOCK_R": 16, **warps}]
table["b_grad"] = [{"BLOCK_T": 16, "BLOCK_D": 16, "BLOCK_R": 16, "EXPERTS": 1, "SPLITS": 1, **warps}]
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
    from hycam_kernels.backends.triton.config_tables import families, family_of_capability

    assert families() == sorted(TARGETS)
    newest = {(8, 0): "sm_80", (8, 7): "sm_86", (9, 0): "sm_90", (10, 3): "sm_100", (12, 1): "sm_120"}
    assert {capability: family_of_capability(*capability) for capability in newest} == newest
    assert family_of_capability(7, 5) is None
