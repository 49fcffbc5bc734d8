"""What came of a run of the tests, by pytest's reports: ``python -m benchmarks.outcomes REPORT.xml ... --out FILE``.

``pytest --junitxml REPORT.xml`` writes such a report. The record counts passed, failed and skipped cases of each test,
with their seconds, and names every package that is installed. Exit status 1 where one failed or where a report holds no
case.
"""

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from packaging.utils import canonicalize_name

from benchmarks.harness.record import Entry, Record, environment

OUTCOMES = ("passed", "failed", "skipped")


def outcomes(report: Path) -> list[Entry]:
    """One entry for each test of a report, its cases counted by outcome."""
    tests: dict[str, Entry] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.attrib['classname'].replace('.', '/')}.py::{case.attrib['name'].split('[')[0]}"
        entry = tests.setdefault(name, {"test": name, **dict.fromkeys(OUTCOMES, 0), "seconds": 0.0})
        entry[_outcome(case)] += 1
        entry["seconds"] = round(entry["seconds"] + float(case.attrib["time"]), 3)
    return [tests[name] for name in sorted(tests)]


def _outcome(case: ElementTree.Element) -> str:
    children = {child.tag for child in case}
    if children & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in children else "passed"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outcomes", description=__doc__.split("\n\n")[0])
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT.xml")
    parser.add_argument("--out", type=Path, required=True, help="the record's file")
    parser.add_argument("--commit", help="of the sources that were tested; by default those of this folder")
    options = parser.parse_args(arguments)
    found = {report: outcomes(report) for report in options.reports}
    packages = {canonicalize_name(found.name): found.version for found in importlib.metadata.distributions()}
    record = Record(options.out, environment(options.commit) | {"packages": dict(sorted(packages.items()))})
    record.entries.extend(entry for report in options.reports for entry in found[report])
    record.write()
    totals = {outcome: sum(entry[outcome] for entry in record.entries) for outcome in OUTCOMES}
    print(", ".join(f"{count} {outcome}" for outcome, count in totals.items()))
    for report in options.reports:
        if not found[report]:
            print(f"{report}: no test ran", file=sys.stderr)
    return 1 if totals["failed"] or not all(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
