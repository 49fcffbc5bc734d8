"""The page's numbers are those of the committed records, and nothing stands in a measured table that is in none."""

import json
import re
import shutil

import pytest

from benchmarks import tables
from benchmarks.cpu import measure
from benchmarks.record import environment
from benchmarks.shapes import Shape
from benchmarks.tables import NOT_MEASURED, PAGE, RESULTS, TABLES, fill, main
from tests.benchmarks.fakes import make_session

EMPTY = "before\n<!-- table: cpu-op -->\nold\n<!-- end -->\n<!-- table: gpu-op -->\n<!-- end -->\nafter\n"


def test_the_page_is_what_the_records_say():
    assert fill(PAGE.read_text(), RESULTS) == PAGE.read_text()
    assert main(["--check"]) == 0


def test_the_page_shows_every_table_once():
    names = re.findall(r"<!-- table: ([\w-]+) -->", PAGE.read_text())
    assert sorted(names) == sorted(TABLES)


def test_no_measured_unit_stands_outside_the_tables():
    """Milliseconds, microseconds and megabytes on the page come from records only."""
    outside = tables._BLOCK.sub("", PAGE.read_text())
    assert not re.findall(r"\d\s*(?:ms|us|µs|MB|GB|TFLOP/s|GB/s)\b", outside)


def test_committed_records_are_of_clean_known_sources():
    for path in RESULTS.glob("*/*.json"):
        record = json.loads(path.read_text())
        assert record["git"]["commit"], path
        assert record["git"]["dirty"] is False, path
        assert (record["gpu"] is None) == (path.parent.name == "cpu"), path
        if record["gpu"]:
            assert record["phases"]["tests"] == "passed", path


def test_without_a_record_a_table_says_so(tmp_path):
    assert fill(EMPTY, tmp_path).count(NOT_MEASURED) == 2


def test_a_changed_page_is_found(tmp_path, monkeypatch, capsys):
    page = tmp_path / "performance.md"
    page.write_text(EMPTY)
    monkeypatch.setattr(tables, "PAGE", page)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert main(["--check"]) == 1
    assert page.read_text() == EMPTY
    assert "python -m benchmarks.tables" in capsys.readouterr().err
    assert main([]) == 0
    assert main(["--check"]) == 0


@pytest.fixture(scope="module")
def cpu_record(tmp_path_factory):
    """A CPU record as `benchmarks.cpu` measures it, with times of a fake clock."""
    session = make_session(tmp_path_factory.mktemp("record") / "r.json", rounds=3)
    session.record.content = environment() | session.record.content | {"git": {"commit": "f" * 40, "dirty": False}}
    measure(session, [Shape(40, 32, num_experts=3, rank=8)], copy_bytes=1 << 10)
    return session.record.path


@pytest.fixture
def results(cpu_record, tmp_path):
    folder = tmp_path / "results" / "cpu"
    folder.mkdir(parents=True)
    shutil.copy(cpu_record, folder / "2026-01-01.json")
    return tmp_path / "results"


def test_every_number_is_traceable_to_the_record(results):
    path = results / "cpu" / "2026-01-01.json"
    record = json.loads(path.read_text())
    for entry in record["entries"]:
        if entry.get("peer") == "torch" and "samples_us" in entry:
            entry["samples_us"] = [4000.0, 8000.0, 6000.0]
    path.write_text(json.dumps(record))
    shown = fill(EMPTY, results)
    assert "| 40, 32 | float32 | both | torch | 6.0 | eager: 0.0 | 4000.00 [2000.00, 4000.00] | count |" in shown
    assert "`benchmarks/results/cpu/2026-01-01.json`" in shown
    assert "sources ffffffffffff (clean)" in shown
    assert shown.startswith("before\n")
    assert shown.endswith("after\n")


def test_the_newest_record_is_shown(results):
    shutil.copy(results / "cpu" / "2026-01-01.json", results / "cpu" / "2026-02-01.json")
    shown = fill(EMPTY, results)
    assert "2026-02-01.json" in shown
    assert "2026-01-01.json" not in shown


def test_a_gpu_record_is_shown_against_its_floor(results):
    header = environment() | {"git": {"commit": "e" * 40, "dirty": False}, "gpu": {"name": "a GPU"}}
    shape = {"tokens": 8, "d": 16}
    entries = [
        {"group": "floor", "shape": shape, "pass": "both", "floor_us": 100.0},
        {"group": "op", "shape": shape, "pass": "both", "peer": "fused", "method": "graph", "samples_us": [110.0] * 3},
        {"group": "op", "shape": shape, "pass": "both", "peer": "fused", "method": "events", "samples_us": [900.0] * 3},
        {"group": "op", "shape": shape, "peer": "eager", "wrong": "not timed"},
        {"group": "op", "shape": shape, "skipped": "0 s were left"},
    ]
    (results / "a-gpu").mkdir()
    (results / "a-gpu" / "r.json").write_text(json.dumps(header | {"entries": entries}))
    shown = fill(EMPTY, results)
    assert "| 8, 16 | both | fused | 110.0 [110.0, 110.0] | 100.0 | 1.10 |" in shown
    assert "900" not in shown
    assert "a GPU; torch" in shown
