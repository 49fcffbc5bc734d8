"""The memory tables of the docs: ``python -m benchmarks.plan`` plans anew, ``--check`` compares the pages alone.

Three shapes are planned, from configurations written here, for every engine on 1, 8 and 64 GPUs. The record lies in
``benchmarks/results/memory.json``; the pages' tables, between ``<!-- table: NAME -->`` and ``<!-- end -->``, are drawn
from it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.pages import fill
from benchmarks.harness.record import ROOT, Record, environment
from benchmarks.models.memory_plan import TABLES, measure
from hycam.environment import package_versions

PAGES = (ROOT / "docs" / "scale.md", ROOT / "docs" / "memory.md")
RECORD = ROOT / "benchmarks" / "results" / "memory.json"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page isn't up to date")
    options = parser.parse_args(arguments)
    if not options.check:
        record = Record(RECORD, environment() | {"versions": package_versions()})
        measure(record)
    content = json.loads(Path(RECORD).read_text(encoding="utf-8"))
    stale = 0
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = fill(before, lambda name: TABLES[name](content))
        if not options.check:
            page.write_text(after, encoding="utf-8")
        elif after != before:
            print(f"{page} isn't what the record says: run `python -m benchmarks.plan`", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
