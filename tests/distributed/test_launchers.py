"""The commands of docs/scale.md as they stand there, on `hycam train`, two processes on CPUs each."""

import json
import os
import re
import shlex
import signal
import stat
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from hycam.training.checkpoints import last_checkpoint
from tests.distributed.ranks import REPOSITORY, environment, free_port, launch
from tests.training.runs import recipe_values, save_backbone, save_recipe

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")

_PAGE = (REPOSITORY / "docs" / "scale.md").read_text(encoding="utf-8")
_TORCHRUN = ["torchrun", "--standalone", "--nproc_per_node", "2", "-m", "hycam", "train", "recipe.yaml"]


def _documented(beginning: str, *, per_node: int = 2) -> str:
    """The page's command that begins so, with these two processes in the place of its nodes and GPUs."""
    lines = _PAGE.replace("\\\n", " ").splitlines()
    (command,) = [line for line in lines if line.startswith(beginning)]
    return _on_this_machine(command, per_node=per_node)


def _on_this_machine(text: str, *, per_node: int) -> str:
    text = re.sub(r"(--nproc_per_node|--num_gpus) 8\b", rf"\1 {per_node}", text)
    text = re.sub(r"--num_processes \d+", "--num_processes 2", text)
    for there, here in (("my-recipe.yaml", "recipe.yaml"), ("node1", "localhost"), ("29500", str(free_port()))):
        text = text.replace(there, here)
    return text


def _recipe(folder: Path) -> Path:
    values = recipe_values(folder, save_backbone(folder / "backbone"))
    values["trainer"] |= {"max_steps": 2}
    return save_recipe(folder, values)


def _run(folder: Path, *commands: list[str]) -> list[float]:
    """The losses of a run of two steps whose commands, one a node, run at once."""
    _recipe(folder)
    with ThreadPoolExecutor() as threads:
        done = list(threads.map(lambda command: launch(command, folder), commands))
    for node in done:
        assert node.returncode == 0, node.stdout[-2000:] + node.stderr[-3000:]
    return _losses(folder)


def _losses(folder: Path) -> list[float]:
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
    assert _run(tmp_path, [*_TORCHRUN, *options]) == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    "beginning",
    ["torchrun --standalone", "accelerate launch --multi_gpu --num_processes 8", "deepspeed --num_gpus 8"],
    ids=lambda beginning: beginning.split()[0],
)
def test_one_node(tmp_path: Path, losses: list[float], beginning: str) -> None:
    command = shlex.split(_documented(beginning))
    # their default ports may be taken here
    if command[0] == "accelerate":
        command[2:2] = ["--main_process_port", str(free_port())]
    if command[0] == "deepspeed":
        command[1:1] = ["--master_port", str(free_port())]
    assert _run(tmp_path, command) == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    ("beginning", "rank_option"),
    [
        ("torchrun --nnodes 2", None),
        ("accelerate launch --multi_gpu --num_machines 2", "--machine_rank"),
        ("deepspeed --hostfile", "--node_rank"),
    ],
    ids=["torchrun", "accelerate", "deepspeed"],
)
def test_two_nodes(tmp_path: Path, losses: list[float], beginning: str, rank_option: str | None) -> None:
    """Two launchers of one process each, on one machine, meet as two nodes do."""
    (tmp_path / "hostfile").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    first = _documented(beginning, per_node=1)
    second = first
    if rank_option is not None:
        second = first.replace(f"{rank_option} 0", f"{rank_option} 1")
        assert second != first
    assert _run(tmp_path, shlex.split(first), shlex.split(second)) == pytest.approx(losses, rel=1e-5)


def test_slurm(tmp_path: Path, losses: list[float]) -> None:
    """The batch script, with stand-ins for Slurm's own commands that start both nodes' launchers here."""
    script = re.search(r"^#!/bin/bash\n.*?(?=^```)", _PAGE, re.MULTILINE | re.DOTALL)
    assert script is not None
    tools = {"scontrol": "echo localhost; echo elsewhere", "srun": '"$@" & "$@"; first=$?; wait $! && exit $first'}
    for name, body in tools.items():
        file = tmp_path / name
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "job.sh").write_text(_on_this_machine(script[0], per_node=1))
    job = {"SLURM_JOB_NODELIST": "both", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    path = f"PATH={tmp_path}{os.pathsep}$PATH"
    settings = " ".join(f"{name}={value}" for name, value in job.items())
    command = ["bash", "-c", f"{path} {settings} bash job.sh"]
    assert _run(tmp_path, command) == pytest.approx(losses, rel=1e-5)


def test_sigterm_to_the_job(tmp_path: Path) -> None:
    """A job manager's, to the launcher and to its workers, who get the launcher's too."""
    values = recipe_values(tmp_path, save_backbone(tmp_path / "backbone"))
    values["trainer"] |= {"max_steps": 100_000, "eval_steps": 100_000, "save_steps": 100_000}
    save_recipe(tmp_path, values)
    metrics = tmp_path / "run" / "metrics.jsonl"
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(
            _TORCHRUN, env=environment(), cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
    try:
        begun = time.monotonic()
        while not (metrics.is_file() and metrics.read_text()):
            assert job.poll() is None
            assert time.monotonic() - begun < 200
            time.sleep(0.2)
        for worker in psutil.Process(job.pid).children(recursive=True):
            worker.send_signal(signal.SIGTERM)
        time.sleep(0.05)  # two signals that wait for Python at once are one
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=100) != 0
    finally:
        if job.poll() is None:
            job.kill()
    output = (tmp_path / "log").read_text()
    assert "hycam: error: stopped by SIGTERM after step" in output, output[-3000:]
    last = last_checkpoint(tmp_path / "run")
    assert last is not None
    assert f"the last good checkpoint is {last}; go on with" in output


def test_accelerate_names_no_engine(tmp_path: Path) -> None:
    _recipe(tmp_path)
    command = shlex.split(_documented("accelerate launch --multi_gpu --num_processes 8").replace("--multi_gpu ", ""))
    command[2:2] = ["--main_process_port", str(free_port()), "--use_fsdp"]
    done = launch(command, tmp_path)
    assert done.returncode != 0
    assert "trainer.fsdp: not set, but the launcher asks for FSDP" in done.stderr
