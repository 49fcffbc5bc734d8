"""Each example runs as its page says, here on a tiny model, and what it leaves is used."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi
from safetensors.torch import load_file

from hycam.training.recipe import load_recipe
from tests.distributed.ranks import REPOSITORY
from tests.training.runs import save_backbone

EXAMPLES = REPOSITORY / "examples"


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    return str(save_backbone(tmp_path_factory.mktemp("backbone")))


@pytest.mark.parametrize("script", ["trainer.py", "sft.py"])
def test_a_trainer_leaves_an_adapter_that_answers(script, backbone, tmp_path):
    if script == "sft.py":
        pytest.importorskip("trl")
    adapter = str(tmp_path / "adapter")
    run(str(EXAMPLES / script), "--model", backbone, "--output", adapter, "--steps", "2")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("hycam_lora_b" in name and tensor.any() for name, tensor in weights.items())
    run(str(EXAMPLES / "generate.py"), "--model", backbone, "--adapter", adapter, "--max-new-tokens", "3")


def test_by_hand(backbone, tmp_path):
    file = tmp_path / "hycam.safetensors"
    said = run(str(EXAMPLES / "by_hand.py"), "--model", backbone, "--output", str(file), "--steps", "10")
    assert "step 10: loss" in said
    weights = load_file(file)
    assert any("hycam_lora_b" in name and tensor.any() for name, tensor in weights.items())
    assert not any("q_proj" in name for name in weights)


def test_a_recipe_of_csv_files(backbone, tmp_path):
    recipe = str(EXAMPLES / "own_data.yaml")
    tasks = [task["name"] for task in yaml.safe_load(Path(recipe).read_text())["tasks"]]
    said = run(
        "-m", "hycam", "train", recipe, "--backbone.name_or_path", backbone, "--output_dir", str(tmp_path / "run"),
        "--method.r", "4", "--trainer.max_steps", "2", "--trainer.eval_steps", "2", "--trainer.use_cpu", "true",
    )  # fmt: skip
    assert all(task in said for task in tasks)
    adapter = tmp_path / "run" / "adapter"
    assert (adapter / "adapter_model.safetensors").is_file()
    asked = ["--prompt", "How many grams are 21 kilograms?"]
    script = run(str(EXAMPLES / "generate.py"), "--model", backbone, "--adapter", str(adapter), *asked)
    command = run(
        "-m", "hycam", "generate", str(tmp_path / "run"), *asked, "--max-new-tokens", "20", "--trainer.use_cpu", "true"
    )
    assert script.strip() == command.strip(), "the script asks as the run trained"


def test_the_page_names_every_example():
    page = (EXAMPLES / "README.md").read_text()
    runnable = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml")} - {"rows.py"}
    assert all(f"`{name}`" in page for name in runnable)


def test_the_laptop_s_tasks_are_the_real_sets_that_are_at_hand(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    laptop = importlib.import_module("laptop")

    def unreachable(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    monkeypatch.delenv("HYCAM_DATA", raising=False)
    assert laptop.real_tasks() == []
    monkeypatch.setattr(HfApi, "dataset_info", lambda *arguments, **options: object())
    assert [(task["name"], "source" in task) for task in laptop.real_tasks()] == [(name, False) for name in laptop.SETS]
    monkeypatch.setenv("HYCAM_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match=r"HYCAM_DATA: .* has none of the files"):
        laptop.real_tasks()
    (tmp_path / "dolly.jsonl").touch()
    assert laptop.real_tasks() == [{"name": "dolly", "source": str(tmp_path / "dolly.jsonl"), "max_rows": laptop.ROWS}]
    given = [("tasks", json.dumps(laptop.real_tasks()))]
    assert [task.name for task in load_recipe("laptop", given).tasks] == ["dolly"]
