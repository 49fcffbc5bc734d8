"""The environments that `make versions` builds, their committed records and the table of them."""

import ast
import json
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks.harness.pages import NOT_MEASURED
from benchmarks.harness.record import ROOT
from benchmarks.harness.versions import versions
from benchmarks.tables import RESULTS

RECORDS = sorted((RESULTS / "versions").glob("*.json"))


def environments() -> dict[str, tuple[str, tuple[str, ...]]]:
    """noxfile.py's, without nox."""
    values = {
        node.targets[0].id: node.value
        for node in ast.parse((ROOT / "noxfile.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return ast.literal_eval(values["ENVIRONMENTS"])


def test_there_are_at_most_six():
    assert 0 < len(environments()) <= 6


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_is_of_its_environment_and_passed(path):
    record = json.loads(path.read_text())
    python, pins = environments()[path.stem]
    assert record["python"].startswith(f"{python}.")
    for pin in map(Requirement, pins):
        installed = record["packages"][pin.name]
        assert pin.specifier.contains(installed, prereleases=True), pin
    assert sum(entry["passed"] for entry in record["entries"]) > 100
    assert [entry["test"] for entry in record["entries"] if entry["failed"]] == []


def test_the_table_has_a_row_for_each_record(tmp_path: Path):
    assert versions(tmp_path) == NOT_MEASURED
    packages = dict.fromkeys(
        ("torch", "triton", "transformers", "peft", "accelerate", "datasets", "trl", "numpy"), "1.0"
    )
    record = {
        "time": "2026-11-28T10:00:00Z",
        "git": {"commit": "f" * 40, "dirty": False},
        "python": "3.13.0",
        "packages": packages | {"triton": None, "peft": "0.21.2"},
        "entries": [
            {"test": "a", "passed": 3, "failed": 0, "skipped": 1},
            {"test": "b", "passed": 2, "failed": 1, "skipped": 0},
        ],
    }
    (tmp_path / "newest.json").write_text(json.dumps(record))
    row = "| newest | 3.13.0 | 1.0 |  | 1.0 | 0.21.2 | 1.0 | 1.0 | 1.0 | 1.0 | 5 | 1 | 1 | ffffffffffff, 2026-11-28 |"
    assert versions(tmp_path).splitlines()[-1] == row
