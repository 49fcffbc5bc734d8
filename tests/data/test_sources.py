import csv
import io
import json
import logging

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from hycam.data.config import TaskConfig
from hycam.data.formats import KNOWN_SETS
from hycam.data.sources import load_task, origin, stream_task
from hycam.errors import InputError

NATIVE = {
    "auto_cot": {"instruction": "2 + 2?", "input": "", "output": "Step by step: 4."},
    "icliniq": {"input": "My knee hurts.", "answer_icliniq": "rest it.", "answer_chatgpt": "unused"},
    "dolly": {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada.", "category": "closed_qa"},
    "code_alpaca": {"instruction": "Add.", "input": "1, 2", "output": "print(1 + 2)"},
    "webgpt": {
        "question": {"dataset": "eli5", "id": "7", "full_text": "Why is the sky blue?"},
        "quotes_0": {"title": ["Sky (a.org)", "Light (b.org)"], "extract": ["Air scatters.", "Blue is short."]},
        "answer_0": "Air scatters blue light [1]. Blue waves are short [1, 2].",
        "score_0": 0.5,
        "quotes_1": {"title": ["Sea (c.org)"], "extract": ["The sea is blue."]},
        "answer_1": "The sea[1][2] mirrors.",
        "score_1": -0.5,
    },
}
UNIFIED = {
    "auto_cot": ("2 + 2?", "", "Step by step: 4."),
    "icliniq": ("My knee hurts.", "", "rest it."),
    "dolly": ("Who?", "Ada wrote it.", "Ada."),
    "code_alpaca": ("Add.", "1, 2", "print(1 + 2)"),
    "webgpt": (
        "Why is the sky blue?",
        "Sky (a.org)\nAir scatters.\n\nLight (b.org)\nBlue is short.",
        "Air scatters blue light. Blue waves are short.",
    ),
}


def write(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def texts(dataset):
    return [(row["instruction"], row["input"], row["output"]) for row in dataset]


def error_of(config):
    with pytest.raises(InputError) as caught:
        load_task(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".JSONL"])
@pytest.mark.parametrize("name", NATIVE)
def test_native_fields_of_a_known_set_from_a_file(tmp_path, name, suffix):
    path = tmp_path / f"rows{suffix.lower()}"
    write(path, [NATIVE[name], NATIVE[name]])
    path = path.rename(tmp_path / f"rows{suffix}")
    by_format = load_task(TaskConfig("mine", source=str(path), format=name))
    by_name = load_task(TaskConfig(name, source=str(path)))
    assert by_format.column_names == ["instruction", "input", "output"]
    assert texts(by_format) == texts(by_name) == [UNIFIED[name]] * 2


@pytest.mark.parametrize("name", NATIVE)
def test_known_set_from_the_hub(monkeypatch, name):
    calls = []

    def load(path, subset, **options):
        calls.append((path, subset, options))
        return Dataset.from_list([NATIVE[name]] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts(load_task(TaskConfig(name, max_rows=2))) == [UNIFIED[name]] * 2
    assert texts(load_task(TaskConfig("mine", source=name))) == [UNIFIED[name]] * 3
    known = KNOWN_SETS[name]
    options = {"split": "train", "data_files": known.data_files, "revision": known.revision}
    assert calls == [(known.hub_id, None, options)] * 2


def test_hub_ids_are_the_published_ones():
    assert {name: known.hub_id for name, known in KNOWN_SETS.items()} == {
        "auto_cot": "QingyiSi/Alpaca-CoT",
        "icliniq": "lavita/ChatDoctor-iCliniq",
        "dolly": "databricks/databricks-dolly-15k",
        "code_alpaca": "sahil2801/CodeAlpaca-20k",
        "webgpt": "openai/webgpt_comparisons",
    }


def test_other_hub_set_by_fields(monkeypatch):
    def load(path, subset, **options):
        assert (path, subset, options["split"], options["revision"]) == ("owner/set", "en", "test[:9]", "v2")
        return Dataset.from_list([{"q": {"text": "Why?"}, "turns": [{"value": "no"}, {"value": "So."}]}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    fields = {"instruction": "q.text", "output": "turns.1.value"}
    config = TaskConfig("mine", "owner/set", fields, split="test[:9]", subset="en", revision="v2")
    assert texts(load_task(config)) == [("Why?", "", "So.")]


def test_hub_id_of_a_known_set_brings_its_fields(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: Dataset.from_list([NATIVE["dolly"]]))
    assert texts(load_task(TaskConfig("mine", source=KNOWN_SETS["dolly"].hub_id))) == [UNIFIED["dolly"]]


def test_no_network_names_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    message = error_of(TaskConfig("dolly"))
    for part in ("dolly", "'databricks/databricks-dolly-15k'", "no network", "a downloaded copy", ".jsonl"):
        assert part in message


def test_other_failures_of_the_hub_are_one_line(monkeypatch):
    def load(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported\nbut found one")

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = error_of(TaskConfig("mine", "owner/set"))
    assert message.endswith("'owner/set' can't be loaded: RuntimeError: Dataset scripts are no longer supported")


def test_fields_of_any_file(tmp_path):
    rows = [{"q": {"text": "Why?"}, "a.b": "So.", "extra": [1, 2]}, {"q": {"text": "How?"}, "a.b": "Thus."}]
    path = write(tmp_path / "rows.jsonl", rows)
    dataset = load_task(TaskConfig("mine", path, fields={"instruction": "q.text", "output": "a.b"}))
    assert texts(dataset) == [("Why?", "", "So."), ("How?", "", "Thus.")]
    with_input = load_task(TaskConfig("mine", path, {"instruction": "q.text", "input": "a.b", "output": "a.b"}))
    assert with_input["input"][:] == ["So.", "Thus."]


def test_unified_names_are_the_default_and_input_may_be_null(tmp_path):
    path = write(tmp_path / "rows.parquet", [{"instruction": "a", "input": None, "output": "b"}])
    assert texts(load_task(TaskConfig("mine", path))) == [("a", "", "b")]


def test_synthetic_task():
    dataset = load_task(TaskConfig("synthetic_code", max_rows=7))
    assert len(dataset) == 7
    assert dataset.column_names == ["instruction", "input", "output"]
    assert "split" in error_of(TaskConfig("synthetic_code", split="test"))
    assert "synthetic_no" in error_of(TaskConfig("synthetic_no"))


@pytest.mark.parametrize(
    ("changes", "output"),
    [
        ({"score_0": 0.0, "score_1": 0.0}, "Air scatters blue light. Blue waves are short."),
        ({"score_0": -0.5, "score_1": 0.5}, "The sea mirrors."),
        ({"score_0": 0, "score_1": -1, "answer_1": ""}, "Air scatters blue light. Blue waves are short."),
        ({"answer_0": "Three [1-3] marks [3a, 3b][12]; kept: [x], [ ], a[i]."}, "Three marks; kept: [x], [ ], a[i]."),
    ],
)
def test_webgpt_preference_and_citation_marks(tmp_path, changes, output):
    path = write(tmp_path / "rows.jsonl", [NATIVE["webgpt"] | changes])
    assert load_task(TaskConfig("webgpt", path))["output"][0] == output


def test_webgpt_quotes_of_the_preferred_answer_in_either_layout(tmp_path):
    row = NATIVE["webgpt"] | {"score_1": 0.9, "quotes_1": [{"title": "Sea (c.org)", "extract": "The sea is blue."}]}
    path = write(
        tmp_path / "rows.jsonl", [row, row | {"quotes_1": None}, row | {"quotes_1": {"title": [], "extract": []}}]
    )
    assert load_task(TaskConfig("webgpt", path))["input"][:] == ["Sea (c.org)\nThe sea is blue.", "", ""]


@pytest.mark.parametrize(
    ("changes", "field", "given"),
    [
        ({"score_0": "high"}, "score_0", "'high' (str)"),
        ({"score_1": None}, "score_1", "null"),
        ({"score_1": True}, "score_1", "True (bool)"),
        ({"question": {"id": "7"}}, "question.full_text", "missing"),
        ({"question": "Why?"}, "question.full_text", "missing"),
        ({"quotes_0": "none"}, "quotes_0", "'none' (str)"),
        ({"quotes_0": {"title": ["a"], "extract": []}}, "quotes_0", "two lists of one length"),
        ({"quotes_0": {"title": [1], "extract": ["b"]}}, "quotes_0.0.title", "1 (int)"),
    ],
)
def test_webgpt_errors(tmp_path, changes, field, given):
    path = write(tmp_path / "rows.jsonl", [NATIVE["webgpt"], NATIVE["webgpt"] | changes])
    message = error_of(TaskConfig("webgpt", path))
    assert message.startswith(f"{path}:2: {field}: ")
    assert given in message


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("row", "field", "given"),
    [
        ({"instruction": "a", "output": "b"}, "context", "missing, the row has instruction, output"),
        ({"instruction": "a", "context": "", "response": 3}, "response", "3 (int), wanted text"),
        ({"instruction": "a", "context": "", "response": None}, "response", "null, wanted text"),
        ({"instruction": ["a"], "context": "", "response": "b"}, "instruction", "a list, wanted text"),
        ({"instruction": "a", "context": {"x": 1}, "response": "b"}, "context", "an object, wanted text"),
    ],
)
def test_row_errors_name_place_and_field(tmp_path, suffix, row, field, given):
    # A parquet column has one type, so there the faulty row stands alone.
    rows = [row] if suffix == ".parquet" else [NATIVE["dolly"], NATIVE["dolly"], row]
    path = write(tmp_path / f"rows{suffix}", rows)
    place = {".json": ": row 3", ".jsonl": ":3", ".parquet": ": row 1"}[suffix]
    message = error_of(TaskConfig("dolly", path))
    assert message.startswith(f"{path}{place}: {field}: ")
    assert given in message


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_rows_without_an_input_have_none(tmp_path, name):
    lines = {
        "rows.jsonl": ['{"instruction": "a", "output": "b"}', '{"instruction": "c", "input": "d", "output": "e"}'],
        "rows.csv": ["instruction,output", "a,b"],
    }
    (tmp_path / name).write_text("\n".join(lines[name]))
    rows = load_task(TaskConfig("mine", str(tmp_path / name)))
    assert rows[0] == {"instruction": "a", "input": "", "output": "b"}
    assert name == "rows.csv" or rows[1]["input"] == "d"


def test_an_input_by_another_name_is_missed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "context": "long", "output": "b"}')
    message = error_of(TaskConfig("mine", str(path)))
    assert message == f"{path}:1: input: missing, the row has instruction, context, output"


def test_blank_lines_count_as_lines_but_not_as_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"instruction": "a", "input": "", "output": "b"}\r\n\r\n  \n{"instruction": "a"}\n')
    assert error_of(TaskConfig("mine", str(path))).startswith(f"{path}:4: output: missing")
    assert len(load_task(TaskConfig("mine", str(path), max_rows=1))) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"a": "x"}\n{"a": \n', ":2: broken JSON, column 7: Expecting value"),
        ("rows.jsonl", b'["a"]\n', ":1: a list, wanted an object"),
        ("rows.jsonl", b'{"a": "\xff"}\n', ":1: a byte that is not utf-8"),
        ("rows.jsonl", b"1" * 5000, ":1: unreadable JSON"),
        ("rows.jsonl", b"[" * 200_000, ":1: unreadable JSON"),
        ("rows.jsonl", b'{"a": "\\ud800"}', ":1: a: half a surrogate pair"),
        ("rows.jsonl", b"", ": no rows"),
        ("rows.jsonl", b"\n\n", ": no rows"),
        ("rows.json", b'[\n{"a": "x"},\n{"a" "y"}\n]', ":3: broken JSON"),
        ("rows.json", b'[\n{"a": "\xff"}]', ":2: a byte that is not utf-8"),
        ("rows.json", b'{"a": "x"}\n{"a": "x"}\n', ":2: broken JSON, column 1: Extra data; a file with a row a line"),
        ("rows.json", b'{"data": []}', ": a dict, wanted an array of rows"),
        ("rows.json", b"[]", ": no rows"),
        ("rows.json", b"", ":1: broken JSON"),
        ("rows.parquet", b"", "can't be read|broken parquet"),
        ("rows.parquet", b"no parquet at all", "broken parquet"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    given = error_of(TaskConfig("mine", str(path), fields={"instruction": "a", "output": "a"}))
    if name == "rows.parquet":
        assert given.startswith(f"{path}: ")
        assert any(part in given for part in message.split("|"))
    else:
        assert given.startswith(f"{path}{message}")


def test_truncated_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    write(path, [NATIVE["dolly"]] * 100)
    path.write_bytes(path.read_bytes()[:-20])
    assert error_of(TaskConfig("dolly", str(path))).startswith(f"{path}: ")


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_unreadable_files(tmp_path, suffix):
    missing = tmp_path / f"missing{suffix}"
    assert error_of(TaskConfig("dolly", str(missing))) == f"{missing}: can't be read: No such file or directory"
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    assert error_of(TaskConfig("dolly", str(folder))).startswith(f"{folder}: can't be read: ")


def test_sources_that_name_nothing(tmp_path):
    message = error_of(TaskConfig("dollly"))
    assert "unknown task 'dollly'" in message
    assert "dolly" in message
    csv = tmp_path / "rows.xlsx"
    csv.write_text("a,b\n")
    assert "wanted a file that ends in one of .json, .jsonl, .parquet, .csv, .tsv" in error_of(
        TaskConfig("a", str(csv))
    )
    assert "wanted a file that ends" in error_of(TaskConfig("a", str(tmp_path)))


@pytest.mark.parametrize("option", [{"split": "test"}, {"subset": "en"}, {"revision": "main"}])
def test_hub_options_are_refused_for_a_file(tmp_path, option):
    path = write(tmp_path / "rows.jsonl", [NATIVE["dolly"]])
    (name,) = option
    assert f"dolly: {name}: {option[name]!r}, wanted none: the source is a file" in error_of(
        TaskConfig("dolly", path, **option)
    )


def test_blank_rows_are_skipped_and_reported(tmp_path, caplog):
    good, blank = NATIVE["dolly"], NATIVE["dolly"] | {"response": " \n"}
    path = write(tmp_path / "rows.jsonl", [good, blank, good, good | {"instruction": ""}, good])
    with caplog.at_level(logging.WARNING):
        dataset = load_task(TaskConfig("dolly", path))
    assert texts(dataset) == [UNIFIED["dolly"]] * 3
    (record,) = caplog.records
    assert record.getMessage() == (f"dolly: skipped rows with a blank instruction or output, 2: {path}:2, {path}:4")
    assert len(load_task(TaskConfig("dolly", path, max_rows=2))) == 2

    path = write(tmp_path / "blank.jsonl", [blank] * 12)
    assert "12 rows, all with a blank" in error_of(TaskConfig("dolly", path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "name: ''"),
        ({"name": 3}, "name: 3"),
        ({"source": 3}, "source: 3, wanted text"),
        ({"source": ""}, "source: '', wanted text"),
        ({"split": None}, "split: None, wanted text"),
        ({"max_rows": 0}, "max_rows: 0, wanted an integer of 1 or more"),
        ({"max_rows": True}, "max_rows: True"),
        ({"format": "doly"}, "format: 'doly', wanted one of auto_cot"),
        ({"fields": {"instruction": "a"}}, "fields: no 'output'"),
        ({"fields": {"instruction": "a", "output": "b", "inputs": "c"}}, "fields: 'inputs', wanted one of instruction"),
        ({"fields": {"instruction": "a", "output": 2}}, "fields: output: 2"),
        ({"fields": "a"}, "fields: 'a', wanted a mapping"),
        ({"fields": {"instruction": "a", "output": "b"}, "format": "dolly"}, "fields: given together with format"),
    ],
)
def test_task_options(options, message):
    with pytest.raises(InputError) as caught:
        TaskConfig(**({"name": "mine"} | options))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (TaskConfig("dolly"), ("general", "databricks/databricks-dolly-15k")),
        (TaskConfig("mine", "data/rows.jsonl", format="webgpt"), ("long-form answers", "rows.jsonl")),
        (TaskConfig("mine", "owner/set", domain="law"), ("law", "owner/set")),
        (TaskConfig("synthetic_code"), (None, "synthetic_code")),
    ],
)
def test_where_rows_come_from(config, want):
    assert origin(config) == want


UNIFIED_ROWS = [
    {"instruction": "Add, please.", "input": "1\n2", "output": 'It is "3".'},
    {"instruction": "007", "input": "", "output": "null"},
]


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tsv"])
def test_tables_and_compressed_files(tmp_path, kind, packed):
    """Quotes, line ends within a value, a mark at the beginning; every value of a table is text."""
    text = io.StringIO()
    if kind == ".jsonl":
        text.write("".join(json.dumps(row) + "\n" for row in UNIFIED_ROWS))
    else:
        writer = csv.DictWriter(
            text, ["instruction", "input", "output", "id"], delimiter="\t" if kind == ".tsv" else ","
        )
        writer.writeheader()
        writer.writerows(row | {"id": "x"} for row in UNIFIED_ROWS)
    path = tmp_path / f"rows{kind}{packed}"
    with pa.output_stream(path, compression={"": None, ".gz": "gzip", ".zst": "zstd"}[packed]) as file:
        file.write(text.getvalue().encode("utf-8" if kind == ".jsonl" else "utf-8-sig"))
    assert load_task(TaskConfig("mine", str(path))).to_list() == UNIFIED_ROWS
    notes = {}
    assert list(stream_task(TaskConfig("mine", str(path)), notes)) == UNIFIED_ROWS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"instruction,output\nonly one\n"),
        ("a.csv", b""),
        ("a.jsonl.gz", b"no gzip"),
        ("a.csv.zst", b"no zstd"),
    ],
)
def test_broken_tables_and_compressed_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert name in error_of(TaskConfig("mine", str(tmp_path / name)))


def test_columns_that_no_task_needs_are_not_converted(tmp_path):
    """A date beyond the year 9999 and a zone that nobody knows have no Python value."""
    table = pa.table(
        {
            "q": ["Why?"],
            "a": ["So."],
            "date": pa.array([10**7], pa.date32()),
            "zone": pa.array([0], pa.timestamp("us", "Nowhere/Unknown")),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    fields = {"instruction": "q", "output": "a"}
    assert texts(load_task(TaskConfig("mine", str(tmp_path / "rows.parquet"), fields))) == [("Why?", "", "So.")]
    wrong = TaskConfig("mine", str(tmp_path / "rows.parquet"), {"instruction": "date", "output": "a"})
    assert "rows.parquet: after row 0" in error_of(wrong)
