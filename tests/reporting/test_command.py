"""`hycam report` as a user meets it."""

import shutil
from pathlib import Path

import pytest

from hycam_cli import main


def test_from_records_into_another_folder(
    study: Path, undrawn: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(study / "cells")
    assert main(["report", str(study), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed[:2]] == ["left out", "left out"]
    assert printed[-1].endswith(f"files of figures and tables: {tmp_path / 'out'}")
    assert (tmp_path / "out/figures/loss_curves-tiny.json").is_file()
    assert not (study / "report").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no study.json, wanted the folder of a study that `hycam compare` ran"),
        (["{study}", "--output", "{study}/study.json"], "--output: {study}/study.json is a file, wanted a folder"),
        (["{study}", "--text", "none.jsonl"], "none.jsonl: can't be read as JSON Lines of text"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    study: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["report", *(argument.format(study=study) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("hycam: error: ") and message.format(study=study) in error
    assert not (study / "report").exists()
