"""Parts rows of the five domains into the tasks of a study and the text that its backbone is trained on.

    python -m hycam.study.corpus DATA OUTPUT [--rows 300]

DATA holds the files below in the sets' native fields. OUTPUT gets `<task>.jsonl`, the tasks' rows as instruction, input
and output; `corpus.jsonl`, lines with a `text`, for `backbone.scratch.corpus`; for `hycam report --text` more of them
that neither the backbone nor a task has: `general.jsonl` of the same sets, and `manual.jsonl` of Python's reference
manual, which is like none of them; and `parts.json`, the counts.
"""

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from hycam.data.config import UNIFIED_FIELDS, TaskConfig
from hycam.data.sources import load_task
from hycam.errors import InputError

# The stand-ins are named as such: they are not the sets whose fields they have.
TASKS = {
    "auto_cot": TaskConfig("auto_cot", "auto_cot.json"),
    "icliniq": TaskConfig("icliniq", "icliniq.json"),
    "dolly": TaskConfig("dolly", "dolly.jsonl"),
    "code_alpaca": TaskConfig("code_alpaca", "code_alpaca.json"),
    "webgpt_standin": TaskConfig("webgpt_standin", "webgpt_standin.jsonl", format="webgpt"),
}
_TEXT_ONLY = TaskConfig("medical_qa_standin", "medical_qa_standin.json", format="icliniq")

# Documents that measure what a method has forgotten: those with the lowest hashes of all sets together.
_GENERAL = 300
# The first characters of each topic of the manual: all of them, and not the long ones' alone.
_OF_TOPIC = 2000

Row = Mapping[str, str]


def hold_apart(sets: Mapping[str, Iterable[Row]], count: int) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """The rows for the tasks, and those for the backbone's text.

    A set's `count` rows whose SHA-256 is lowest are the task's. Of the others, the text has those that share no whole
    field with a task's row of any set (in any case and spacing): no question, context or answer is in both.

    Args:
        sets: name -> rows with `instruction`, `input` and `output`.
        count: rows of each task, where the set has so many.

    Returns:
        Task -> rows, and set -> rows of text; both in the order of the hashes.
    """
    ordered = {name: sorted(rows, key=_digest) for name, rows in sets.items()}
    tasks = {name: rows[:count] for name, rows in ordered.items() if name in TASKS}
    seen = {text for rows in tasks.values() for row in rows for text in _texts(row)}
    others = {name: rows[count:] if name in tasks else rows for name, rows in ordered.items()}
    return tasks, {name: [row for row in rows if seen.isdisjoint(_texts(row))] for name, rows in others.items()}


def _digest(row: Row) -> str:
    return hashlib.sha256(json.dumps([row[field] for field in UNIFIED_FIELDS]).encode()).hexdigest()


def _texts(row: Row) -> list[str]:
    texts = (" ".join(row[field].lower().split()) for field in UNIFIED_FIELDS)
    return [text for text in texts if text]


def write_parts(data: Path, output: Path, count: int) -> dict[str, Any]:
    """Read the sets in `data`, part them, and write the files.

    Returns:
        What `parts.json` holds: rows per task, documents per set, how many of all are general text, and the SHA-256 of
        every file.

    Raises:
        InputError: a file that is missing or can't be read, with its name.
    """
    if count < 1:
        raise InputError(f"--rows: got {count}, wanted at least 1")
    sets: dict[str, list[Row]] = {}
    for name, task in (TASKS | {_TEXT_ONLY.name: _TEXT_ONLY}).items():
        dataset = load_task(TaskConfig(name, str(data / str(task.source)), format=task.format))
        sets[name] = [{field: row[field] for field in UNIFIED_FIELDS} for row in dataset]
    tasks, texts = hold_apart(sets, count)
    documents = [
        {"text": "\n\n".join(row[field].strip() for field in UNIFIED_FIELDS if row[field].strip())}
        for row in sorted((row for rows in texts.values() for row in rows), key=_digest)
    ]
    files = {f"{name}.jsonl": _lines(rows) for name, rows in tasks.items()}
    files |= {"general.jsonl": _lines(documents[:_GENERAL]), "corpus.jsonl": _lines(documents[_GENERAL:])}
    files["manual.jsonl"] = _lines({"text": topics[name][:_OF_TOPIC]} for name in sorted(topics))
    parts = {
        "tasks": {name: len(rows) for name, rows in tasks.items()},
        "documents": {name: len(rows) for name, rows in texts.items()},
        "general": len(documents[:_GENERAL]),
        "sha256": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()},
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (output / name).write_text(text, encoding="utf-8")
    (output / "parts.json").write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")
    return parts


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hycam.study.corpus", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with the sets' files")
    parser.add_argument("output", type=Path, help="folder for the parts")
    parser.add_argument("--rows", type=int, default=300, help="rows of each task (default: 300)")
    options = parser.parse_args()
    try:
        parts = write_parts(options.data, options.output, options.rows)
    except InputError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(json.dumps(parts, indent=2))


if __name__ == "__main__":
    main()
