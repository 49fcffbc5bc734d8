"""Every table that a page asks for is drawn by somebody."""

import re

from benchmarks import study
from benchmarks.harness.pages import BLOCK, fill
from benchmarks.harness.record import ROOT
from benchmarks.harness.tables import TABLES
from benchmarks.machine import pages as counts
from benchmarks.models import memory_plan
from tests.adapter import outcomes
from tests.evaluation import metric_tools


def test_each_marker_has_one_source():
    sources = [{*TABLES, "versions", "builds", "platforms"}, set(counts.TABLES), set(memory_plan.TABLES)]
    sources += [set(study.drawn(folder)) for folder in study.STUDIES]
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for name in re.findall(r"<!-- table: ([\w-]+) -->", page.read_text()):
            by_tests = next((drawer.table(name) for drawer in (outcomes, metric_tools) if page == drawer.PAGE), None)
            assert by_tests or any(name in source for source in sources), f"{page.name}: {name}"
        assert len(BLOCK.findall(page.read_text())) == page.read_text().count("<!-- table: "), page.name


def test_a_table_of_another_source_stays():
    page = "<!-- table: mine -->\nold\n<!-- end -->\n<!-- table: other -->\nold\n<!-- end -->\n"
    assert fill(page, {"mine": "new"}.get) == page.replace("old", "new", 1)
