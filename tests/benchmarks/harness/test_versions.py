"""The environments that `make versions` builds, their committed records and the tables of them."""

import ast
import json
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks import platforms as command
from benchmarks.harness.pages import NOT_MEASURED
from benchmarks.harness.record import ROOT
from benchmarks.harness.versions import platforms, promises, versions
from benchmarks.tables import RESULTS
from hycam_kernels.versions import release

RECORDS = sorted((RESULTS / "versions").glob("*.json"))


def environments() -> dict[str, tuple[str, tuple[str, ...]]]:
    """noxfile.py's, without nox."""
    values = {
        node.targets[0].id: node.value
        for node in ast.parse((ROOT / "noxfile.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return ast.literal_eval(values["ENVIRONMENTS"])


def test_there_are_at_most_six_and_each_has_its_record():
    assert 0 < len(environments()) <= 6
    assert {path.stem for path in RECORDS} == set(environments())


def test_every_floor_is_a_tested_version():
    """By an environment that pins it, or by the versions that all tests run with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    lines += [line for extra in project["project"]["optional-dependencies"].values() for line in extra]
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [pin for _, pinned in environments().values() for pin in pinned]
    tested = set()
    for pin in map(Requirement, [*pins, *(line for line in constraints if "==" in line)]):
        tested |= {
            (canonicalize_name(pin.name), release(each.version)) for each in pin.specifier if each.operator == "=="
        }
    for wanted in map(Requirement, lines):
        for each in wanted.specifier:
            assert each.operator == ">=", wanted
            assert (canonicalize_name(wanted.name), release(each.version)) in tested, wanted


def test_every_floor_for_users_is_in_the_oldest_environment():
    pins = set(environments()["oldest"][1])
    assert {f"{name}{floor.replace('>=', '==')}" for name, floor in promises().items() if floor} <= pins


def test_every_python_that_is_named_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {line.rpartition(" ")[2] for line in project["classifiers"] if "Python :: 3." in line}
    assert named == {python for python, _ in environments().values()}
    assert project["requires-python"] == f">={min(named, key=release)}"


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


def record(torch: str, **packages: str) -> dict:
    return {
        "time": "2026-11-28T10:00:00Z",
        "git": {"commit": "f" * 40, "dirty": False},
        "python": "3.13.0",
        "packages": {"torch": torch, **packages},
        "entries": [
            {"test": "a", "passed": 3, "failed": 0, "skipped": 1},
            {"test": "b", "passed": 2, "failed": 1, "skipped": 0},
        ],
    }


def test_the_table_has_a_column_for_each_record_and_a_row_for_each_package(tmp_path: Path):
    assert versions(tmp_path) == NOT_MEASURED
    (tmp_path / "newest.json").write_text(json.dumps(record("2.13.0+cpu", peft="0.21.2")))
    (tmp_path / "oldest.json").write_text(json.dumps(record("2.6.0", peft="0.21.0", trl="1.16.0")))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in versions(tmp_path).splitlines()]
    assert rows[0] == ["", "promised", "oldest", "newest"]
    shown = {row[0]: row[1:] for row in rows[2:]}
    assert set(promises()) <= set(shown)
    assert shown["Python"] == [">=3.11", "3.13.0", "3.13.0"]
    assert shown["torch"] == [promises()["torch"], "2.6.0", "2.13.0+cpu"]
    assert shown["peft"] == [promises()["peft"], "0.21.0", "0.21.2"]
    assert shown["trl"] == ["", "1.16.0", ""]
    assert shown["tests passed"] == ["", "5", "5"]
    assert shown["tests failed"] == ["", "1", "1"]
    assert shown["sources, date"] == ["", *["ffffffffffff, 2026-11-28"] * 2]


def test_other_systems_are_asked_after_one_by_one(tmp_path, monkeypatch, capsys):
    """By a stand-in for uv: one of them has no wheel of torch."""

    def uv(arguments, **_):
        if "windows" in " ".join(arguments):
            raise subprocess.CalledProcessError(1, arguments, stderr="no wheel of torch\n")
        return subprocess.CompletedProcess(arguments, 0, stdout="peft==0.21.2\ntorch==2.14.1\n")

    assert platforms(tmp_path / "platforms.json") == NOT_MEASURED
    monkeypatch.setattr(subprocess, "run", uv)
    monkeypatch.setattr(command, "environment", dict)
    assert command.main(["--out", str(tmp_path / "platforms.json")]) == 1
    assert "Windows, x86-64, Python 3.14: no wheel of torch" in capsys.readouterr().err
    lines = platforms(tmp_path / "platforms.json").splitlines()
    assert len(lines) == 2 + len(command.SYSTEMS) * len(command.PYTHONS)
    assert "| macOS, ARM | 3.14 | 2.14.1 |  |  | 0.21.2 |  |  |  |" in lines
    assert "| Windows, x86-64 | 3.11 |  |  |  |  |  |  |  |" in lines


def test_all_of_them_resolved_when_last_asked():
    entries = json.loads((RESULTS / "platforms.json").read_text())["entries"]
    assert {(entry["system"], entry["python"]) for entry in entries} == {
        (system, python) for system in command.SYSTEMS for python in command.PYTHONS
    }
    for entry in entries:
        found = {name: release(version) for name, version in entry["packages"].items()}
        for name in ("torch", "transformers", "peft", "accelerate", "datasets", "numpy"):
            assert found[name] >= release(promises()[name].removeprefix(">=")), entry
