"""The launchers that docs/scale.md names, on `hycam train`, two processes on CPUs each."""

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import free_port, launch
from tests.training.runs import recipe_values, save_backbone, save_recipe

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")

_ACCELERATE = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
_ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]
_TORCHRUN = ["torchrun", "--standalone", "--nproc_per_node", "2"]


def _run(folder: Path, launcher: list[str], *options: str, module: str = "-m") -> list[float]:
    """The losses of a run of two steps."""
    folder.mkdir(exist_ok=True)
    values = recipe_values(folder, save_backbone(folder / "backbone"))
    values["trainer"] |= {"max_steps": 2}
    recipe = save_recipe(folder, values)
    done = launch([*launcher, module, "hycam", "train", str(recipe), *options], folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert json.loads((folder / "run" / "run.json").read_text())["processes"] == 2
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Those of DDP under torchrun."""
    return _run(tmp_path_factory.mktemp("ddp"), _TORCHRUN)


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.fsdp", "true"],
        *(["--trainer.deepspeed", name] for name in ("zero1", "zero2", "zero3")),
        *(["--trainer.deepspeed", f"{name}_offload"] for name in ("zero1", "zero2", "zero3")),
    ],
    ids=lambda options: options[1],
)
def test_torchrun(tmp_path: Path, losses: list[float], options: list[str]) -> None:
    assert _run(tmp_path, _TORCHRUN, *options) == pytest.approx(losses, rel=1e-5)


def test_two_nodes_with_a_rendezvous(tmp_path: Path, losses: list[float]) -> None:
    """Two agents of one process each meet at an address, as on two nodes."""
    import threading

    port = free_port()
    command = ["torchrun", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_id", "7", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", f"localhost:{port}"]
    values = recipe_values(tmp_path, save_backbone(tmp_path / "backbone"))
    values["trainer"] |= {"max_steps": 2}
    arguments = [*command, "-m", "hycam", "train", str(save_recipe(tmp_path, values))]
    second = threading.Thread(target=launch, args=(arguments, tmp_path))
    second.start()
    done = launch(arguments, tmp_path)
    second.join()
    assert done.returncode == 0, done.stderr[-3000:]
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(losses, rel=1e-5)


def test_accelerate(tmp_path: Path, losses: list[float]) -> None:
    assert _run(tmp_path, [*_ACCELERATE, "--main_process_port", str(free_port())]) == pytest.approx(losses, rel=1e-5)


def test_accelerate_names_no_engine(tmp_path: Path) -> None:
    values = recipe_values(tmp_path, tmp_path / "none")
    launcher = [*_ACCELERATE[3:], "--main_process_port", str(free_port()), "--use_fsdp"]
    done = launch(
        ["accelerate", "launch", *launcher, "-m", "hycam", "train", str(save_recipe(tmp_path, values))], tmp_path
    )
    assert done.returncode != 0
    assert "trainer.fsdp: not set, but the launcher asks for FSDP" in done.stderr


def test_deepspeed(tmp_path: Path, losses: list[float]) -> None:
    launcher = ["deepspeed", "--num_gpus", "2", "--no_local_rank", "--master_port", str(free_port())]
    assert _run(tmp_path, launcher, "--trainer.deepspeed", "zero2", module="--module") == pytest.approx(
        losses, rel=1e-5
    )
