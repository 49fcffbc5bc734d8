"""What is printed: tables that are never cut, numbers in the digits that say something, the environment."""

import json
import math

import pytest

from hycam.commands.compare import study_table
from hycam.commands.tables import metrics_table, show
from hycam.study.render import Number, Row
from hycam.study.render import Table as StudyTable
from hycam_cli import main


@pytest.mark.parametrize(
    ("value", "shown"), [(84.4123, "84.412"), (99999.4, "99999.400"), (9655604.503, "9.66e+06"), (math.inf, "inf")]
)
def test_a_perplexity_is_shown_in_the_digits_that_say_something(
    value: float, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"perplexity": value, "tokens": 3}
    show(metrics_table("test split", {"base": {"tasks": {"a": entry}, "overall": entry}}))
    assert capsys.readouterr().out.count(f" {shown} ") == 2


def test_tables_are_never_cut(capsys, monkeypatch):
    """In 40 columns, and in a file, every number is there; of two reports there is the gain."""
    monkeypatch.setenv("COLUMNS", "40")
    report = {"perplexity": 98765.432, "bleu4": 12.34, "rougeL": 56.78, "tokens": 1_234_567}
    better = report | {"perplexity": 9876.5432, "bleu4": 23.45, "rougeL": 50.0}
    reports = {name: {"tasks": {"a_task": values}, "overall": values} for name, values in
               (("base", report), ("adapted", better))}  # fmt: skip
    show(metrics_table("test split", reports))
    shown = capsys.readouterr().out
    for number in ("98765.432", "9876.543", "10.0 x", "12.34", "+11.11", "56.78", "-6.78", "1,234,567", "a_task"):
        assert number in shown
    assert "…" not in shown
    show(metrics_table("test split", {"base": reports["base"]}))
    shown = capsys.readouterr().out
    assert "gain" not in shown and "A BLEU-4 of 0" not in shown
    report["bleu4"] = 0.0
    show(metrics_table("test split", reports))
    assert "A BLEU-4 of 0: no run of four tokens matched" in " ".join(capsys.readouterr().out.split())


def test_env_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"]
    assert report["devices"][0]["device"] == "cpu"
    assert {choice["dtype"] for choice in report["backends"]} == {"bfloat16", "float32"}
    assert all(choice["backend"].split(":")[0] in ("torch", "triton") for choice in report["backends"])
    assert main(["env"]) == 0
    assert "hycam_modulation" in capsys.readouterr().out


def test_a_study_s_tables_are_never_cut(capsys, monkeypatch):
    """Their numbers have spaces, and their columns' names several words."""
    monkeypatch.setenv("COLUMNS", "40")
    numbers = [Number(21_713_280, None, digits=0), None, Number(1234.5, 98.7654, digits=3, count=3)]
    columns = ["method", "trained parameters", "share, %", "PPL, row average"]
    rows = [Row("smollm2-135m", [name, *numbers]) for name in ("backbone alone", "hycam")]
    show(study_table(StudyTable("table2", "Methods", columns, rows)))
    shown = capsys.readouterr().out
    for text in ("1,234.500 ± 98.765", "21,713,280", "trained", "parameters", "average", "alone", "hycam", "smollm2"):
        assert text in shown
    assert "…" not in shown
