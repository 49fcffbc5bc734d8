"""One row in every format and by every way of reading: the same texts, or the same words of what is wrong with it."""

import csv
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from hycam.data.cache import RowCache
from hycam.data.config import TaskConfig
from hycam.data.sources import load_task, stream_task
from hycam.errors import InputError

INSTRUCTION = "What is it?"
# Among texts those that other readers take for something else: numbers, truth values, dates, JSON.
TEXTS = [
    "Yes.",
    "42",
    "007",
    "1e3",
    "nan",
    "true",
    "null",
    "None",
    "1969-07-20",
    '"quoted"',
    "[1, 2]",
    "a\n\tb",
    " é ",
    "",
    " \n",
]
OTHERS: dict[str, Any] = {
    "null": None,
    "42 (int)": 42,
    "-0.5 (float)": -0.5,
    "True (bool)": True,
    "a list": ["a", "b"],
    "an object": {"a": "b"},
}
VALUES = [*TEXTS, *OTHERS.values()]
Row = dict[str, Any]


def outcome(given: Any, output: Any) -> tuple[str, ...] | str:
    """What a user gets of a row: its three texts, nothing of a blank one, or an error in these words."""
    for field, value in (("input", given), ("output", output)):
        if not isinstance(value, str) and not (field == "input" and value is None):
            kind = next(name for name, other in OTHERS.items() if type(other) is type(value))
            return f"{field}: {kind}, wanted text"
    return (INSTRUCTION, given or "", output) if output.strip() else "skipped"


def cases() -> Iterator[tuple[Any, Any]]:
    """Every value in every field, and pairs drawn at random."""
    yield from ((value, "So.") for value in VALUES)
    yield from (("", value) for value in VALUES)
    draws = random.Random(0)
    yield from ((draws.choice(VALUES), draws.choice(VALUES)) for _ in range(20))


def json_lines(path: Path, rows: list[Row]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pa.output_stream(path, compression=compression) as file:
        file.write(text.encode())


def json_array(path: Path, rows: list[Row]) -> None:
    path.write_text(json.dumps(rows), encoding="utf-8")


def parquet(path: Path, rows: list[Row]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def parquet_of_json(path: Path, rows: list[Row]) -> None:
    """Columns of the logical type JSON, as Spark, DuckDB and datasets write them."""
    columns = {name: pa.array([json.dumps(row[name]) for row in rows]) for name in rows[0]}
    kind = pa.json_(pa.string())
    pq.write_table(
        pa.table({name: pa.ExtensionArray.from_storage(kind, texts) for name, texts in columns.items()}), path
    )


def separated(path: Path, rows: list[Row]) -> None:
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    delimiter = "\t" if ".tsv" in path.name else ","
    with pa.output_stream(path, compression=compression) as stream:
        lines = [*([*rows[0]],), *([*row.values()] for row in rows)]

        class Text:
            def write(self, text: str) -> None:
                stream.write(text.encode())

        csv.writer(Text(), delimiter=delimiter).writerows(lines)


TYPED: dict[str, Callable[[Path, list[Row]], None]] = {
    "rows.json": json_array,
    "rows.jsonl": json_lines,
    "rows.jsonl.gz": json_lines,
    "rows.jsonl.zst": json_lines,
    "rows.parquet": parquet,
    "json.parquet": parquet_of_json,
}
TABLES = ["rows.csv", "rows.tsv", "rows.csv.gz", "rows.tsv.zst"]


def read(path: Path, cache: RowCache) -> Iterator[tuple[str, Any]]:
    """What each way of reading makes of a file: `outcome`'s values, the error without its place."""
    config = TaskConfig("mine", str(path))
    ways: dict[str, Callable[[], list[Row]]] = {
        "in memory": lambda: load_task(config).to_list(),
        "mapped": lambda: load_task(config, cache).to_list(),
        "mapped again": lambda: load_task(config, cache).to_list(),
        "streamed": lambda: list(stream_task(config, {})),
    }
    if path.suffix == ".json":
        del ways["streamed"]
    for way, rows in ways.items():
        try:
            found: Any = [tuple(row.values()) for row in rows()]
        except InputError as error:
            found = str(error).partition(": ")[2].removeprefix("row 1: ")
            if "all with a blank" in found:
                found = []
        yield way, found


@pytest.mark.parametrize("name", TYPED)
def test_a_value_is_the_same_in_every_format(tmp_path, name):
    cache = RowCache(tmp_path / "cache")
    for number, (given, output) in enumerate(cases()):
        path = tmp_path / f"{number}-{name}"
        TYPED[name](path, [{"instruction": INSTRUCTION, "input": given, "output": output}])
        wanted = outcome(given, output)
        wanted = [] if wanted == "skipped" else [wanted] if isinstance(wanted, tuple) else wanted
        for way, found in read(path, cache):
            assert found == wanted, (name, way, given, output)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_s_cells_are_the_texts_that_they_are(tmp_path, name):
    """No number, truth value, date or null is made of one."""
    cache, texts = RowCache(tmp_path / "cache"), [value for value in TEXTS if value.strip()]
    pairs = zip(TEXTS[: len(texts)], reversed(texts), strict=True)
    rows = [{"instruction": INSTRUCTION, "input": given, "output": output} for given, output in pairs]
    path = tmp_path / name
    separated(path, rows)
    for way, found in read(path, cache):
        assert found == [tuple(row.values()) for row in rows], (name, way)


def test_values_of_all_kinds_in_one_column(tmp_path):
    """The first that is no text is named by its place; of JSON in Parquet as of lines."""
    rows = [{"instruction": INSTRUCTION, "input": given, "output": "So."} for given in ("a", None, "42", {"b": 1}, 5)]
    for name, place in (("rows.jsonl", ":4"), ("rows.json", ": row 4"), ("json.parquet", ": row 4")):
        TYPED[name](tmp_path / name, rows)
        with pytest.raises(InputError) as caught:
            load_task(TaskConfig("mine", str(tmp_path / name)))
        assert str(caught.value) == f"{tmp_path / name}{place}: input: an object, wanted text"
        assert load_task(TaskConfig("mine", str(tmp_path / name), max_rows=3))["input"][:] == ["a", "", "42"]


NESTED = [
    {"id": 1, "question": {"full": "Why?"}, "answers": [{"text": "So."}, {"text": "No.", "votes": 3}]},
    {"id": "2", "question": {"full": "How?", "tags": ["a"]}, "answers": [{"text": "Thus."}]},
    {"id": None, "question": {"full": "When?"}, "answers": [{"text": "Now.", "votes": "many"}]},
]
FIELDS = {"instruction": "question.full", "output": "answers.0.text"}
WANTED = [("Why?", "", "So."), ("How?", "", "Thus."), ("When?", "", "Now.")]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz", "json.parquet", "datasets.parquet"])
def test_nested_answers_beside_fields_of_mixed_types(tmp_path, name):
    path, cache = tmp_path / name, RowCache(tmp_path / "cache")
    if name == "datasets.parquet":
        Dataset.from_list(NESTED, on_mixed_types="use_json").to_parquet(str(path))
    else:
        TYPED[name](path, NESTED)
    config = TaskConfig("mine", str(path), fields=FIELDS)
    ways = [load_task(config), load_task(config, cache), *([] if name == "rows.json" else [stream_task(config, {})])]
    for rows in ways:
        assert [tuple(row.values()) for row in rows] == WANTED


def test_json_inside_of_parquet_s_own_types(tmp_path):
    texts = pa.ExtensionArray.from_storage(pa.json_(pa.string()), pa.array(['"So."', "7"]))
    answers = pa.ListArray.from_arrays(pa.array([0, 2]), pa.StructArray.from_arrays([texts], names=["text"]))
    pq.write_table(pa.table({"question": ["Why?"], "answers": answers}), tmp_path / "rows.parquet")
    config = TaskConfig("mine", str(tmp_path / "rows.parquet"), FIELDS | {"instruction": "question"})
    assert load_task(config)["output"][:] == ["So."]
    config.fields["output"] = "answers.1.text"
    with pytest.raises(InputError, match=r"rows\.parquet: row 1: answers\.1\.text: 7 \(int\), wanted text"):
        load_task(config)


def test_broken_json_in_parquet_is_named(tmp_path):
    texts = pa.ExtensionArray.from_storage(pa.json_(pa.string()), pa.array(['"So."', '{"a"']))
    pq.write_table(pa.table({"instruction": ["a", "b"], "output": texts}), tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"rows\.parquet: after row 1: broken parquet: Expecting ':'"):
        load_task(TaskConfig("mine", str(tmp_path / "rows.parquet")))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_set_of_mixed_types_is_read_as_its_file(tmp_path, monkeypatch, streaming):
    """As datasets' own reader of JSON types the columns."""
    json_lines(tmp_path / "rows.jsonl", NESTED)
    real = datasets.load_dataset

    def load(path, subset, **options):
        options = {key: options[key] for key in ("split", "streaming") if key in options}
        return real("json", data_files=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    config = TaskConfig("mine", "owner/set", fields=FIELDS, revision="0" * 40)
    rows = stream_task(config, {}) if streaming else load_task(config)
    assert [tuple(row.values()) for row in rows] == WANTED
