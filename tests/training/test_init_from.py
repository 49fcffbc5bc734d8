"""A run that goes on from another's adapter, with another task and more experts."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hycam.errors import InputError
from hycam.study.recipe import parse_study
from hycam.training.run import train
from tests.training.runs import run_recipe

_ONE_STEP = {"max_steps": 1, "eval_steps": 1, "save_steps": 1}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Path:
    """The adapter of a run of two tasks and two experts."""
    recipe = run_recipe(tmp_path_factory.mktemp("first"), backbone, trainer=_ONE_STEP)
    train(recipe)
    return recipe.output_path / "adapter"


def test_a_run_goes_on_from_anothers_adapter(tmp_path: Path, backbone: Path, first: Path) -> None:
    method = {"init_from": str(first), "num_experts": 3}
    recipe = run_recipe(tmp_path, backbone, method=method, trainer=_ONE_STEP | {"learning_rate": 0.0})
    recipe.tasks[0].name = "others"
    said: list[str] = []
    train(recipe, announce=said.append)
    assert f"from {first}: 10 of 10 tensors kept, experts 0 to 1 of 3; experts 2 to 2 are new" in said
    before, after = (load_file(path / "adapter_model.safetensors") for path in (first, recipe.output_path / "adapter"))
    assert all(torch.equal(after[name][: len(tensor)], tensor) for name, tensor in before.items())
    assert f"init_from: {first}" in (recipe.output_path / "recipe.yaml").read_text()


def test_a_run_that_is_resumed_needs_it_no_more(tmp_path: Path, backbone: Path, first: Path) -> None:
    start = shutil.copytree(first, tmp_path / "start")
    recipe = run_recipe(tmp_path, backbone, method={"init_from": str(start)}, trainer=_ONE_STEP)
    train(recipe)
    shutil.rmtree(start)
    (recipe.output_path / "results.json").unlink()
    said: list[str] = []
    train(recipe, resume=True, announce=said.append)
    assert any("going on from" in line for line in said) and not any("tensors kept" in line for line in said)


def _refused(monkeypatch: pytest.MonkeyPatch, recipe: Any) -> str:
    import hycam.training.prepare as module

    monkeypatch.setattr(module, "load_model", None)  # what is wrong is found before
    with pytest.raises(InputError) as error:
        train(recipe)
    assert not recipe.output_path.exists()
    return str(error.value)


def test_an_adapter_that_does_not_fit_is_refused_before_the_model_is_loaded(
    tmp_path: Path, backbone: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = run_recipe(tmp_path, backbone, method={"init_from": str(first), "r": 8})
    message = _refused(monkeypatch, other)
    assert message.startswith(f"method.init_from: {first}: ") and message.endswith("is [2, 4, 32], wanted [2, 8, 32]")
    nowhere = run_recipe(tmp_path, backbone, method={"init_from": "nowhere"})
    assert _refused(monkeypatch, nowhere).startswith("method.init_from: nowhere has no adapter_config.json, wanted")
    damaged = shutil.copytree(first, tmp_path / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"")
    message = _refused(monkeypatch, run_recipe(tmp_path, backbone, method={"init_from": str(damaged)}))
    assert message.startswith(f"method.init_from: {damaged}/adapter_model.safetensors: can't be read: ")


def test_rows_that_it_was_trained_on_are_not_held_out(
    tmp_path: Path, backbone: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = run_recipe(tmp_path, backbone, method={"init_from": str(first)}, data={"fold": 1})
    assert "the rows of colours that are held out now are not those of the run in" in _refused(monkeypatch, recipe)


def test_no_method_of_a_study_has_a_start_of_its_own() -> None:
    values = {
        "backbones": {"a": {"name_or_path": "x"}},
        "methods": {"hycam": {"init_from": "runs/a/adapter"}, "lora": {"name": "lora"}},
        "tasks": [{"name": "dolly"}],
        "trainer": {"max_steps": 3},
    }
    with pytest.raises(InputError, match=r"study\.yaml: methods\.hycam\.init_from: every run of a study starts anew"):
        parse_study(values, "study.yaml")
