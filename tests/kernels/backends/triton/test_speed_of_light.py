"""Each kernel against its floor: every kernel that a call launches has a cost, and is timed alone as launched."""

import re

import pytest
import torch

from benchmarks.harness.record import ROOT
from benchmarks.op import kernels
from benchmarks.op.kernels import COSTS, LaunchLog, decode_calls, measure_kernels, norm_calls, training_calls
from benchmarks.op.shapes import Shape
from hycam_kernels.backends.triton import tuning
from hycam_kernels.backends.triton.config_tables import INTERPRETER
from hycam_kernels.backends.triton.launch import COMPILER_OPTIONS
from tests.benchmarks.fakes import make_session
from tests.kernels.backends.triton.conftest import INTERPRETING

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="a fake clock and the interpreter's table are meant")
SHAPE, DECODE = Shape(40, 32, num_experts=3, rank=16), Shape(2, 32, num_experts=3, rank=16)
CPU = torch.device("cpu")


def make_log() -> LaunchLog:
    return LaunchLog(INTERPRETER, inline_assembly=False)


@pytest.mark.parametrize(("calls", "shape"), [(training_calls, SHAPE), (decode_calls, DECODE), (norm_calls, SHAPE)])
def test_every_launch_has_a_cost_and_repeats_its_results(calls, shape):
    log = make_log()
    calls(log, shape, torch.float32, CPU)
    assert log.launches
    for launch in log.launches:
        cost = COSTS[launch.name](shape, launch.arguments | launch.config, 4)
        assert cost.bytes > 0
        results = {
            name: tensor.clone()
            for name, tensor in launch.arguments.items()
            if isinstance(tensor, torch.Tensor) and not tensor.requires_grad
        }
        launch.run()
        for name, before in results.items():
            assert torch.equal(launch.arguments[name], before), (launch.name, name)


def test_every_kernel_of_the_package_has_a_cost():
    """Those that no table launches in these calls too."""
    folder = ROOT / "hycam_kernels" / "backends" / "triton" / "kernels"
    launched = {
        name for path in folder.glob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    assert launched == set(COSTS)


def test_a_kernel_moves_at_least_its_cost():
    """No cost is above the bytes of the tensors that the launch was given, plus what it shares with none."""
    log = make_log()
    training_calls(log, SHAPE, torch.float32, CPU)
    for launch in log.launches:
        given = sum(
            tensor.nbytes for tensor in launch.arguments.values() if isinstance(tensor, torch.Tensor) and tensor.ndim
        )
        cost = COSTS[launch.name](SHAPE, launch.arguments | launch.config, 4)
        assert cost.bytes <= 1.2 * given, launch.name
        assert cost.bytes >= 0.4 * given, launch.name


@pytest.fixture
def session(tmp_path):
    session = make_session(tmp_path / "r.json")
    session.add("rate", what="copy", per_second=4e12)
    session.add("rate", SHAPE, what="product", per_second=8e14)
    return session


def test_kernels_are_recorded_with_their_floor(session):
    measure_kernels(session, torch.float32, [SHAPE], [DECODE])
    entries = [entry for entry in session.record.entries if entry["group"] == "kernel"]
    assert not [entry for entry in entries if "error" in entry or "wrong" in entry]
    assert {entry["what"] for entry in entries} >= {
        "router_kernel", "fusion_forward_kernel", "b_grad_kernel", "decode_fusion_kernel", "norm_projection_kernel"
    }  # fmt: skip
    for entry in entries:
        assert entry["samples_us"] == [1.0, 2.0, 3.0]
        assert entry["floor_us"] == pytest.approx(1e6 * max(entry["flops"] / 8e14, entry["bytes"] / 4e12))


def test_a_wrong_kernel_is_not_timed(session, monkeypatch):
    def broken(*arguments):
        raise kernels.WrongResultError("fused: output 0: not timed")

    monkeypatch.setattr(kernels.Oracle, "check", broken)
    measure_kernels(session, torch.float32, [SHAPE], [])
    entries = [entry for entry in session.record.entries if entry.get("what") == "training_calls"]
    assert [entry["wrong"] for entry in entries] == ["fused: output 0: not timed"]


def test_every_launch_asks_for_the_same_arithmetic():
    """Fused multiply-adds, which triton 3.10 leaves off by default: calls, their repetition, trials and warm-ups."""
    asked = []

    class Kernel:
        __name__ = "kernel"

        def __getitem__(self, grid):
            return lambda **given: asked.append(given)

        def warmup(self, grid, **given):
            asked.append(given)

    given = {"num_warps": 4, "tokens": 7}
    launcher = make_log()
    launcher(Kernel(), (1,), {"num_warps": 4}, tokens=7)
    tuning.RowLauncher(launcher.table)(Kernel(), (1,), {"num_warps": 4}, tokens=7)
    tuning.WarmUpLauncher(launcher.table)(Kernel(), (1,), {"num_warps": 4}, tokens=7)
    launcher.launches[0].run()
    assert asked == [given | COMPILER_OPTIONS] * 4
    assert COMPILER_OPTIONS["enable_fp_fusion"] is True
