"""The text that a study's backbone sees shares nothing with its tasks."""

import json
import os
from pathlib import Path

import pytest

from hycam.data.config import UNIFIED_FIELDS
from hycam.study.corpus import TASKS, hold_apart, main, write_parts


def _row(instruction: str, context: str = "", output: str = "answer") -> dict[str, str]:
    return {"instruction": instruction, "input": context, "output": output}


def _fields(rows: list[dict[str, str]]) -> set[str]:
    return {" ".join(row[field].lower().split()) for row in rows for field in UNIFIED_FIELDS} - {""}


def test_rows_that_share_a_field_with_a_task_are_in_neither_part() -> None:
    rows = [_row(f"question {n}", f"context {n % 7}", f"answer {n % 11}") for n in range(100)]
    echoes = [_row(row["instruction"].upper().replace(" ", "\n "), "new", "new") for row in rows]
    tasks, texts = hold_apart({"dolly": rows, "medical": echoes}, 10)
    assert len(tasks["dolly"]) == 10 and tasks.keys() == {"dolly"}
    taken = _fields(tasks["dolly"])
    assert taken.isdisjoint(_fields(texts["dolly"]) | _fields(texts["medical"]))
    assert len(texts["medical"]) == 90
    # and no more is left out than that
    assert [row for row in rows if taken.isdisjoint(_fields([row]))] == sorted(texts["dolly"], key=rows.index)


def test_the_parts_do_not_depend_on_the_order_of_the_rows() -> None:
    rows = [_row(f"question {n}", "", f"answer {n}") for n in range(50)]
    assert hold_apart({"dolly": rows}, 5) == hold_apart({"dolly": rows[::-1]}, 5)


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["corpus", str(tmp_path), str(tmp_path / "parts")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "auto_cot.json: can't be read" in error and error.count("\n") == 1


@pytest.mark.skipif("HYCAM_DATA" not in os.environ, reason="HYCAM_DATA names no folder with the real sets")
def test_the_real_sets_are_held_apart(tmp_path: Path) -> None:
    parts = write_parts(Path(os.environ["HYCAM_DATA"]), tmp_path, 100)
    assert parts["tasks"] == dict.fromkeys(TASKS, 100)
    assert parts["documents"]["medical_qa_standin"] > 5000
    tasks = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in TASKS
    }
    corpus, general = (
        [json.loads(line)["text"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("corpus", "general")
    )
    documents = corpus + general
    assert len(general) == parts["general"] == 300
    assert len(documents) == sum(parts["documents"].values())
    # a document is a row's fields, so it holds a task's whole instruction only where that is part of another field
    instructions = {row["instruction"].strip() for rows in tasks.values() for row in rows}
    assert instructions.isdisjoint(text.split("\n\n")[0].strip() for text in documents)
    manual = [json.loads(line)["text"] for line in (tmp_path / "manual.jsonl").read_text().splitlines()]
    assert len(manual) > 50 and set(manual).isdisjoint(documents)
    assert parts["sha256"].keys() == {path.name for path in tmp_path.glob("*.jsonl")}
