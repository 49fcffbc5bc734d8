"""The record of a test run counts what pytest reported."""

import importlib.metadata
import json
import subprocess
import sys

import pytest

from benchmarks import outcomes

TESTS = """
import pytest

@pytest.mark.parametrize("i", range(4))
def test_numbers(i):
    assert i != 2

def test_left_out():
    pytest.skip("on purpose")

@pytest.fixture
def broken():
    raise RuntimeError

def test_with_a_broken_fixture(broken):
    pass
"""


@pytest.fixture
def report(tmp_path):
    folder = tmp_path / "tests" / "part"
    folder.mkdir(parents=True)
    (folder / "test_some.py").write_text(TESTS)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", "report.xml", "tests"]
    subprocess.run(command, cwd=tmp_path, check=False, capture_output=True)
    return tmp_path / "report.xml"


def test_cases_are_counted_by_test_and_outcome(report, tmp_path, capsys):
    record = tmp_path / "record.json"

    status = outcomes.main([str(report), "--out", str(record), "--commit", "abc"])

    assert status == 1
    assert capsys.readouterr().out == "3 passed, 2 failed, 1 skipped\n"
    content = json.loads(record.read_text())
    assert content["git"]["commit"] == "abc"
    counts = {entry["test"]: [entry[name] for name in outcomes.OUTCOMES] for entry in content["entries"]}
    assert counts == {
        "tests/part/test_some.py::test_left_out": [0, 0, 1],
        "tests/part/test_some.py::test_numbers": [3, 1, 0],
        "tests/part/test_some.py::test_with_a_broken_fixture": [0, 1, 0],
    }
    assert all(entry["seconds"] >= 0 for entry in content["entries"])
    assert content["packages"]["pytest"] == pytest.__version__
    assert content["packages"]["typing-extensions"] == importlib.metadata.version("typing_extensions")


def test_a_report_without_a_case_is_a_failure(tmp_path, capsys):
    empty = tmp_path / "empty.xml"
    empty.write_text("<testsuites><testsuite/></testsuites>")

    assert outcomes.main([str(empty), "--out", str(tmp_path / "record.json")]) == 1

    assert "empty.xml: no test ran" in capsys.readouterr().err
