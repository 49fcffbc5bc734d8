"""The pages say what the memory record says, and the record what the planner says."""

import json
import re

import pytest

from benchmarks import plan
from benchmarks.harness.pages import fill
from benchmarks.models.memory_plan import TABLES, WORLD_SIZES
from benchmarks.models.memory_plan import plan as planned
from benchmarks.plan import PAGES, RECORD, main


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text())


def test_the_pages_are_what_the_record_says(record, monkeypatch, tmp_path, capsys):
    texts = [page.read_text() for page in PAGES]
    assert [fill(text, lambda name: TABLES[name](record)) for text in texts] == texts
    assert main(["--check"]) == 0
    assert sorted(re.findall(r"<!-- table: ([\w-]+) -->", "".join(texts))) == sorted(TABLES)
    other = tmp_path / "memory.json"
    other.write_text(RECORD.read_text().replace('"sum": 1', '"sum": 2'))
    monkeypatch.setattr(plan, "RECORD", other)
    assert main(["--check"]) == 1
    assert capsys.readouterr().err.count("run `python -m benchmarks.plan`") == len(PAGES)


def test_the_record_is_what_the_planner_says(record):
    wanted = [
        {key: value for key, value in entry.items() if key != "group"}
        for entry in record["entries"]
        if entry["group"] == "engines" and entry["shape"] == "Llama 3.2 1B" and entry["engine"] == "zero2"
    ]
    assert planned("Llama 3.2 1B", "zero2", WORLD_SIZES) == wanted


def test_the_shapes_are_the_models_that_they_are_named_after(record):
    # published totals, of the backbone alone
    totals = {"Llama 3.2 1B": 1_235_814_400, "Llama 3.1 8B": 8_030_261_248, "Qwen 2.5 14B": 14_770_033_664}
    for entry in record["entries"]:
        assert entry["total"] - entry["trained"] == totals[entry["shape"]]
