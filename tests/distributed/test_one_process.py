"""One process under an engine that a launcher starts: the losses are those without it."""

import subprocess
import sys
from pathlib import Path

import pytest

from hycam.training.callbacks import read_metrics
from hycam.training.recipe import load_recipe
from hycam.training.run import train
from tests.distributed.jobs import engine_fields
from tests.distributed.ranks import environment, free_port
from tests.training.runs import recipe_values, save_backbone, save_recipe

pytest.importorskip("deepspeed")


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def test_deepspeed_alone(tmp_path):
    backbone = save_backbone(tmp_path / "backbone")
    recipes = {}
    for name, fields in (("plain", {}), ("zero2", engine_fields("zero2"))):
        (tmp_path / name).mkdir()
        values = recipe_values(tmp_path / name, backbone, method={"noise": "never"})
        values["trainer"] |= {"max_steps": 3, "logging_steps": 1} | fields
        recipes[name] = str(save_recipe(tmp_path / name, values))
    train(load_recipe(recipes["plain"]), test=False)
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "hycam", "train", recipes["zero2"]],
        env=environment() | launched | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plain = losses(tmp_path / "plain" / "run")
    assert len(plain) == 3
    assert losses(tmp_path / "zero2" / "run") == pytest.approx(plain, rel=1e-5)
