"""`hycam eval`: what it measures, of which rows, and where it writes."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from hycam_cli import main
from tests.commands.invocation import ENVIRONMENT, error_line, in_a_process
from tests.training.runs import rows, save_rows


def test_eval_of_a_run_and_of_its_backbone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = json.loads((run / "results.json").read_text())["test"]
    assert main(["eval", str(run), "--evaluation.max_new_tokens", "4"]) == 0
    output = capsys.readouterr().out
    assert "BLEU-4" in output and "ROUGE-L" in output
    adapted = json.loads((run / "eval-test.json").read_text())
    assert adapted["overall"]["nll"] == pytest.approx(results["adapted"]["overall"]["nll"], rel=1e-6)
    assert {"bleu4", "rougeL"} <= adapted["tasks"]["colours"].keys()
    assert adapted["adapter"] == str(run / "adapter")
    output_file = run.parent / "base.json"
    assert main(["eval", str(run), "--base", "--no-generation", "--output", str(output_file)]) == 0
    base = json.loads(output_file.read_text())
    assert base["adapter"] is None
    assert base["overall"] == results["base"]["overall"]
    assert main(["eval", "--adapter", str(run / "adapter"), "--no-generation", "--output", str(output_file)]) == 0
    assert json.loads(output_file.read_text())["overall"] == {
        name: adapted["overall"][name] for name in ("nll", "tokens", "perplexity", "row_average")
    }


def test_another_adapters_numbers_are_no_runs_own(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint's go beside those of the run's adapter, in a file of their own."""
    own = run / "eval-validation.json"
    arguments = ["--split", "validation", "--no-generation"]
    assert main(["eval", "--adapter", str(run / "adapter"), *arguments]) == 0
    before = own.read_text()
    checkpoint = min(run.glob("checkpoint-*"))
    assert main(["eval", "--adapter", str(checkpoint), *arguments]) == 0
    beside = json.loads((run / f"eval-{checkpoint.name}-validation.json").read_text())
    assert beside["adapter"] == str(checkpoint) and own.read_text() == before
    elsewhere = tmp_path / "adapter"
    shutil.copytree(checkpoint, elsewhere)
    assert main(["eval", str(run), "--adapter", str(elsewhere), *arguments]) == 0
    assert (run / "eval-adapter-validation.json").is_file() and own.read_text() == before


def test_eval_with_flags_alone(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows_file = save_rows(tmp_path / "mine.jsonl", rows(12))
    backbone = str(run.parent / "backbone")
    arguments = ["eval", "--backbone.name_or_path", backbone, "--task", f"mine={rows_file}", "--split", "all"]
    assert main([*arguments, "--data.max_length", "64", "--data.prompt", "chat", "--no-generation"]) == 0
    report = json.loads((tmp_path / "eval-all.json").read_text())
    assert list(report["tasks"]) == ["mine"]
    assert report["split"] == "all"
    assert report["overall"]["tokens"] > 12


def test_rows_that_no_fold_parts_are_measured_whole(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_rows(tmp_path / "own.jsonl", rows(2))
    options = ["--task", f"own={source}", "--no-generation", "--output", str(tmp_path / "own.json")]
    assert "fold 0: no row of 2 falls to the" in error_line(capsys, "eval", str(run), *options)
    assert main(["eval", str(run), *options, "--split", "all"]) == 0
    assert json.loads((tmp_path / "own.json").read_text())["tasks"]["own"]["tokens"] > 0


def test_an_unknown_task_lists_the_recipes_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--task", "nosuch"]) == 2
    assert (
        "--task: 'nosuch' is none of the recipe's (colours, animals), nor a known set (auto_cot"
        in capsys.readouterr().err
    )


def test_no_bar_is_drawn_into_a_file(run: Path) -> None:
    done = subprocess.run(
        in_a_process("eval", str(run), "--evaluation.max_new_tokens", "2"), env=ENVIRONMENT, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert b"\r" not in done.stdout + done.stderr
