"""A run that is killed or stopped goes on from its last whole checkpoint as if nothing had happened, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from hycam.data.streaming import StreamCollator
from hycam.errors import InputError, RunStoppedError
from hycam.training.checkpoints import last_checkpoint, remove_unfinished
from hycam.training.folder import open_folder
from hycam.training.recipe import Recipe
from hycam.training.resume import check_record
from hycam.training.run import train
from hycam_cli import main
from tests.training.runs import SignalAt, also_call, assert_same_run, rows, run_recipe, save_rows

_KILL_AT_STEP = """
from hycam.training.callbacks import MetricsFile
log = MetricsFile.on_log
def on_log(self, args, state, control, **kwargs):
    log(self, args, state, control, **kwargs)
    if state.global_step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
MetricsFile.on_log = on_log
"""
_KILL_WHILE_SAVING = """
import torch
save = torch.save
def half(value, path, *args, **kwargs):
    save(value, path, *args, **kwargs)
    if "checkpoint-8" in str(path):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
"""


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    train(run_recipe(folder, backbone))
    return folder / "run"


def _train_until_sigterm(recipe: Recipe, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From where the run is, until a signal in the middle of `step`."""
    with monkeypatch.context() as patch:
        also_call(patch, SignalAt(signal.SIGTERM, step))
        with pytest.raises(RunStoppedError):
            train(recipe, resume=True)


@pytest.mark.parametrize(("killer", "kept"), [(_KILL_AT_STEP, "checkpoint-4"), (_KILL_WHILE_SAVING, "checkpoint-4")])
def test_resumes_bit_for_bit_after_sigkill(
    tmp_path: Path, backbone: Path, straight: Path, killer: str, kept: str
) -> None:
    recipe = run_recipe(tmp_path, backbone)
    script = f"import os, signal, sys\nfrom hycam_cli import main\n{killer}\nsys.exit(main(sys.argv[1:]))"
    killed = subprocess.run(
        [sys.executable, "-c", script, "train", str(tmp_path / "recipe.yaml")],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = tmp_path / "run"
    assert not (run / "results.json").exists()
    assert last_checkpoint(run) == run / kept
    train(recipe, resume=True)
    assert_same_run(run, straight)


def test_a_mean_that_a_stop_parts_is_logged_whole(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # this preset draws noise in evaluation too, trains norms and freezes a random router
    sections = {
        "method": {"preset": "released_code"},
        "trainer": {"logging_steps": 3, "gradient_accumulation_steps": 2},
    }
    train(run_recipe(tmp_path / "whole", backbone, **sections))
    stopped = run_recipe(tmp_path / "stopped", backbone, **sections)
    _train_until_sigterm(stopped, 5, monkeypatch)
    for _ in range(2):  # the second time there is nothing left to train
        train(stopped, resume=True)
        assert_same_run(tmp_path / "stopped" / "run", tmp_path / "whole" / "run")


def test_resumes_across_epochs_with_accumulation_and_packing(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {
        "data": {"packing": True},
        "trainer": {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2}
        | {"per_device_train_batch_size": 1},
    }
    whole = run_recipe(tmp_path / "whole", backbone, **sections)
    steps = train(whole)["steps"]
    assert steps > 6
    stopped = run_recipe(tmp_path / "stopped", backbone, **sections)
    for step in (steps // 3, steps // 3 + 2):  # the end of an epoch, and inside the next
        _train_until_sigterm(stopped, step, monkeypatch)
    train(stopped, resume=True)
    assert_same_run(tmp_path / "stopped" / "run", tmp_path / "whole" / "run")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_it_was(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """In its second pass over the rows, with another number of loader processes too; no row is tokenized twice."""
    streaming = {"shuffle_buffer": 8, "held_out_rows": 5, "weights": {"animals": 2.0}}
    sections = {
        "data": {"streaming": streaming},
        "trainer": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 6},
    }
    train(run_recipe(tmp_path / "whole", backbone, **sections))
    stopped = run_recipe(tmp_path / "stopped", backbone, **sections)
    _train_until_sigterm(stopped, 6, monkeypatch)
    stopped.trainer["dataloader_num_workers"] = workers
    collate, passed_over = StreamCollator.__call__, []

    def noted(self: StreamCollator, batch: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        made = collate(self, batch)
        passed_over.append(not made)
        return made

    monkeypatch.setattr(StreamCollator, "__call__", noted)
    results = train(stopped, resume=True)
    if not workers:
        assert passed_over[:16] == 12 * [True] + 4 * [False]
    assert_same_run(tmp_path / "stopped" / "run", tmp_path / "whole" / "run")
    # held_out_rows is a bound, and these files have few rows to test on
    assert results["rows"] == {"validation": {"colours": 5, "animals": 5}, "test": {"colours": 5, "animals": 2}}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_flaw_that_a_stream_comes_to_is_named(tmp_path: Path, backbone: Path, workers: int) -> None:
    sections = {
        "data": {"streaming": {"shuffle_buffer": 2, "held_out_rows": 2}},
        "trainer": {"dataloader_num_workers": workers, "max_steps": 20, "per_device_train_batch_size": 24},
    }
    recipe = run_recipe(tmp_path, backbone, **sections)
    with save_rows(tmp_path / "colours.jsonl", rows(200)).open("a") as file:
        file.write("{broken\n")
    with pytest.raises(InputError) as error:
        train(recipe)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/colours.jsonl:201: broken JSON")
    assert "\n" not in message
    assert f"; the last good checkpoint is {tmp_path}/run/checkpoint-" in message


def test_loader_processes_change_nothing(tmp_path: Path, backbone: Path, straight: Path) -> None:
    train(run_recipe(tmp_path, backbone, trainer={"dataloader_num_workers": 2}))
    assert_same_run(tmp_path / "run", straight)


def test_a_finished_run_only_measures_again(tmp_path: Path, backbone: Path, straight: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    shutil.rmtree(tmp_path / "run" / "adapter")
    recipe = run_recipe(tmp_path, backbone)
    results = train(recipe, resume=True)
    assert results["steps"] == 8
    assert_same_run(tmp_path / "run", straight)


def test_resume_refuses_another_recipe_or_other_rows(tmp_path: Path, backbone: Path, straight: Path) -> None:
    recipe = run_recipe(tmp_path, backbone)
    shutil.copytree(straight, tmp_path / "run")
    with pytest.raises(InputError, match="holds a run: --resume goes on with it"):
        train(recipe)
    other = run_recipe(tmp_path, backbone, trainer={"learning_rate": 2e-2, "max_steps": 9}, data={"fold": 1})
    with pytest.raises(InputError, match=r"values of: data.fold, trainer.learning_rate, trainer.max_steps$"):
        train(other, resume=True)
    rows = tmp_path / "colours.jsonl"
    recipe = run_recipe(tmp_path, backbone)
    rows.write_text(rows.read_text().replace("is red", "is pink", 1))
    with pytest.raises(InputError, match="rows of colours are no longer"):
        train(recipe, resume=True)


def test_rows_that_are_split_otherwise_are_told(
    tmp_path: Path, backbone: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of a version that split rows by instruction and input neither goes on nor is measured on its own rows."""
    shutil.copytree(straight, tmp_path / "run")
    recipe = run_recipe(tmp_path, backbone)
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    del record["data"]["colours"]["held_out"]
    path.write_text(json.dumps(record))
    before = tmp_path / "run" / "recipe.yaml"
    values = yaml.safe_load(before.read_text())
    for task in values["tasks"]:
        del task["split_by"]
    before.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match=r"^--resume: the rows of colours fall to other parts .*a version before"):
        train(recipe, resume=True)
    command = ["eval", str(tmp_path / "run"), "--no-generation"]
    assert main(command) == 2
    assert "it was trained on some of them" in capsys.readouterr().err
    assert main([*command, "--split", "all"]) == 0
    assert main([*command, "--base"]) == 0


def test_resume_refuses_another_commit_of_the_backbone(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch of the hub may move; the revision that names the run's own commit goes on."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache = tmp_path / "models--someone--tiny"
    first, second = ("1" * 40, "2" * 40)
    for commit in (first, second):
        shutil.copytree(backbone, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(first)
    sections = {
        "trainer": {"max_steps": 1, "save_steps": 1, "eval_steps": 1},
        "backbone": {"name_or_path": "someone/tiny"},
    }
    recipe = run_recipe(tmp_path, backbone, **sections)
    train(recipe, test=False)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["commit"] == first
    (cache / "refs" / "main").write_text(second)
    with pytest.raises(InputError, match=rf"commit {first} of its backbone, got {second}: wanted --backbone.revision"):
        train(recipe, resume=True)
    recipe.backbone.revision = first
    assert train(recipe, resume=True, test=False)["steps"] == 1


def test_resume_refuses_other_settings_in_an_engines_file(tmp_path: Path, backbone: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text("{}")
    recipe = run_recipe(tmp_path, backbone, trainer={"deepspeed": str(file)})
    open_folder(recipe, {}, None, 1, resume=False, overwrite=False)
    check_record(recipe, {}, None, 1)
    file.write_text('{"zero_optimization": {"stage": 2}}')
    with pytest.raises(InputError, match=r"^--resume: the file of trainer.deepspeed is no longer the one"):
        check_record(recipe, {}, None, 1)


def test_fields_that_touch_no_weight_may_change_on_resuming(tmp_path: Path, backbone: Path, straight: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    free = {"report_to": "tensorboard", "ddp_timeout": 3600, "dataloader_num_workers": 1}
    recipe = run_recipe(tmp_path, backbone, trainer=free, evaluation={"batch_size": 3})
    assert train(recipe, resume=True)["steps"] == 8


def test_when_a_run_validates_may_not_change_on_resuming(tmp_path: Path, backbone: Path, straight: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    kinds = ("eval", "logging", "save")
    changes = {f"{kind}_strategy": "epoch" for kind in kinds} | {f"{kind}_steps": 2 for kind in kinds}
    recipe = run_recipe(tmp_path, backbone, trainer=changes)
    with pytest.raises(InputError, match=f"values of: {', '.join(f'trainer.{name}' for name in sorted(changes))}$"):
        train(recipe, resume=True)


def test_half_written_checkpoints_are_removed(tmp_path: Path) -> None:
    for name, state in (
        ("checkpoint-2", '{"global_step": 2}'),
        ("checkpoint-10", '{"global_st'),
        ("checkpoint-12", None),
    ):
        (tmp_path / name).mkdir()
        if state is not None:
            (tmp_path / name / "trainer_state.json").write_text(state)
    (tmp_path / "unfinished" / "checkpoint-14").mkdir(parents=True)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
