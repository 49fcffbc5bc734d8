"""`hycam train` and `hycam demo` as a user meets them: exit status, one line of error, what they print and write."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hycam_cli import main
from tests.commands.invocation import ENVIRONMENT, error_line, in_a_process
from tests.training.runs import recipe_values, rows, save_recipe


def test_train_writes_the_run_and_prints_its_tables(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(run.parent / "recipe.yaml")
    message = error_line(capsys, "train", recipe)
    assert message == f"output_dir: {run} holds a run: --resume goes on with it, --overwrite deletes it"
    assert main(["train", str(run), "--resume"]) == 0
    output = capsys.readouterr().out
    assert "parameters are trained" in output
    assert "test split" in output and "expert load" in output
    for task in ("colours", "animals", "overall"):
        assert task in output
    assert "--resume: the run in" in error_line(capsys, "train", recipe, "--resume")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"max_lenght": 64}}, "recipe.yaml: data.max_lenght: unknown field; did you mean 'max_length'?"),
        ({"trainer": {"learning_rate": "high"}}, "recipe.yaml: trainer.learning_rate: got 'high' (str), wanted float"),
        ({"backbone": {"name_or_path": "./nothing"}}, "backbone.name_or_path: ./nothing: no such folder"),
        ({"backbone": {"name_or_path": "models/of/nobody"}}, "name_or_path: models/of/nobody: no such folder"),
        ({"tasks": [{"name": "b", "source": "broken.jsonl"}]}, "broken.jsonl:2"),
        ({"tasks": [{"name": "f", "source": "fieldless.jsonl"}]}, "fieldless.jsonl:1: output"),
        ({"tasks": [{"name": "e", "source": "empty.jsonl"}]}, "empty.jsonl"),
        ({"tasks": [{"name": "m", "source": "missing.jsonl"}]}, "missing.jsonl"),
        ({"tasks": [{"name": "doly"}]}, "doly"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    good = json.dumps(rows(1)[0])
    (tmp_path / "broken.jsonl").write_text(f"{good}\n{{'no json'\n")
    (tmp_path / "fieldless.jsonl").write_text('{"instruction": "a", "input": ""}\n')
    (tmp_path / "empty.jsonl").write_text("")
    save_recipe(tmp_path, recipe_values(tmp_path, run.parent / "backbone", **change))
    assert message in error_line(capsys, "train", "recipe.yaml")
    assert not (tmp_path / "run").exists()


def test_the_demo_replaces_its_own_run_but_no_other(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for the demo's recipe, which takes minutes."""
    import hycam.training.recipe as module

    demo = save_recipe(
        tmp_path,
        recipe_values(tmp_path, run.parent / "backbone", trainer={"max_steps": 1, "save_steps": 1, "eval_steps": 1}),
    )
    monkeypatch.setattr(module, "packaged_recipes", lambda: {"demo": demo})
    assert main(["train"]) == 0
    written = (tmp_path / "run" / "results.json").stat().st_mtime_ns
    assert main(["train"]) == 0
    assert (tmp_path / "run" / "results.json").stat().st_mtime_ns > written
    assert "holds a run" in error_line(capsys, "train", "demo")
    assert "holds a run" in error_line(capsys, "train", "--output_dir", str(run))


def test_a_run_that_was_stopped_says_how_to_go_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped, ignore=shutil.ignore_patterns("adapter"))
    newest = max(stopped.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    message = error_line(capsys, "generate", str(stopped), "--prompt", "x")
    assert message.endswith(f"--resume goes on with it, --adapter {newest} takes what it had saved")
    assert main(["generate", "--adapter", str(newest), "--prompt", "x", "--evaluation.max_new_tokens", "4"]) == 0
    message = error_line(capsys, "generate", str(newest), "--prompt", "x")
    assert message.endswith(f"{newest}: the folder has no recipe.yaml; --adapter takes the folder of an adapter")
    for folder in stopped.glob("checkpoint-*"):
        shutil.rmtree(folder)
    assert error_line(capsys, "eval", str(stopped)).endswith("--resume goes on with it")


@pytest.mark.slow
def test_two_processes_train_as_one(run: Path, tmp_path: Path) -> None:
    """Data-parallel over two processes of half the batch: the same losses up to the order of the sums."""
    losses = []
    for name, batch, launcher in (
        ("one", 4, []),
        ("two", 2, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        values = recipe_values(folder, run.parent / "backbone", method={"noise": "never"})
        values["trainer"] |= {"max_steps": 4, "per_device_train_batch_size": batch}
        command = [sys.executable, *launcher, "-m", "hycam", "train", str(save_recipe(folder, values))]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("parameters are trained") == 1
        lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
        losses.append([line[key] for line in lines for key in ("loss", "eval_loss") if key in line])
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_sigterm_to_the_process(run: Path, tmp_path: Path) -> None:
    values = recipe_values(
        tmp_path, run.parent / "backbone", trainer={"max_steps": 100_000, "eval_strategy": "no", "save_steps": 100_000}
    )
    values["trainer"] |= {"load_best_model_at_end": False}
    recipe = save_recipe(tmp_path, values)
    process = subprocess.Popen(
        in_a_process("train", str(recipe)),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.stat().st_size) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    # other packages' messages, the Trainer's log among them, aren't on stdout
    assert len(output.splitlines()) == 1
    assert "parameters are trained" in output
    last = errors.strip().splitlines()[-1]
    assert last.startswith("hycam: error: stopped by SIGTERM after step ")
    assert last.endswith(f"go on with: hycam train {tmp_path / 'run'} --resume")
    checkpoints = list((tmp_path / "run").glob("checkpoint-*/trainer_state.json"))
    assert len(checkpoints) == 1
