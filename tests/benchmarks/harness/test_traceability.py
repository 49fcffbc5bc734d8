"""Every measured number in README and docs is traceable to a record by file name.

The rule: an amount with a unit of time, size or speed stands in a table that `benchmarks.tables` draws between its
markers, or in a block (a paragraph, or a table with the paragraph before it) that names the file of a record, or that
says that it is no measurement: a count on paper, read off compiled code, a limit, or a goal.
"""

import re
from pathlib import Path

import pytest

from benchmarks.harness.pages import BLOCK, NOT_MEASURED
from benchmarks.harness.record import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
AMOUNT = re.compile(
    r"\d[\d.,]*\s?(?:"
    r"(?:[nuµm]?s|sec|seconds?|min|minutes?|hours?)\b"
    r"|[KMGT]i?B(?:/s)?\b|[MGT]FLOPS?(?:/s)?\b|(?:tokens|samples|steps)(?:/s| per second| a second)"
    r"|%|(?:x|times) (?:faster|slower|smaller|larger|less|more|fewer|the|that|as)\b)"
)
NO_MEASUREMENT = re.compile(r"\b(?:on\s+paper|compiled|limit|goal)\b", re.IGNORECASE)
RECORD = re.compile(r"benchmarks/results/[\w./-]+\.json")


def blocks(text: str) -> list[str]:
    """Paragraphs without the drawn tables; a table belongs to the paragraph before it."""
    found: list[str] = []
    for block in re.split(r"\n\s*\n", BLOCK.sub("", text)):
        if block.lstrip().startswith("|") and found:
            found[-1] += "\n" + block
        else:
            found.append(block)
    return found


def untraceable(text: str) -> list[str]:
    """The amounts of a page that the rule doesn't allow."""
    amounts = []
    for block in blocks(text):
        records = RECORD.findall(block)
        if not (NO_MEASUREMENT.search(block) or (records and all((ROOT / name).exists() for name in records))):
            amounts += [match[0] for match in AMOUNT.finditer(block)]
    return amounts


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_amount_is_traceable(page: Path):
    assert untraceable(page.read_text()) == []


@pytest.mark.parametrize(
    "claim",
    [
        "It takes 3.5 ms.",
        "It runs at 700 TFLOP/s.",
        "| T | us |\n| --- | --- |\n| 8 | 12 us |",
        "Training reaches 12,000 tokens per second.",
        "It is 2.5 x faster.",
        "It is 3 times as fast.",
        "It saves 40 %.",
        "It needs 17 GB.",
        "See benchmarks/results/cpu/none.json: 3 ms.",
        f"<!-- table: cpu-op -->\n{NOT_MEASURED}\n<!-- end -->\nand 3 ms beside it",
    ],
)
def test_a_bare_claim_is_found(claim):
    assert untraceable(f"A page.\n\n{claim}\n")


@pytest.mark.parametrize(
    "text",
    [
        "On paper it takes 3.5 ms.",
        "Floors on paper:\n\n| T | floor |\n| --- | --- |\n| 8 | 12 us |",
        "`make gpu` has a limit of 10 minutes.",
        "<!-- table: cpu-op -->\n| 3 ms |\n<!-- end -->",
        "T = 8192, d = 4096, r = 64, sm_90, 7B",
    ],
)
def test_what_is_no_measurement_stays(text):
    assert untraceable(f"A page.\n\n{text}\n") == []


def test_a_claim_may_name_its_record(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.benchmarks.harness.test_traceability.ROOT", tmp_path)
    record = tmp_path / "benchmarks" / "results" / "cpu" / "a.json"
    claim = "3 ms (`benchmarks/results/cpu/a.json`)"
    assert untraceable(claim)
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    assert untraceable(claim) == []
