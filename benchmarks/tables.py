"""Tables and plots of `docs/performance.md` from the committed records: ``python -m benchmarks.tables [--check]``.

A table, or the plots of a record, stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. Each names the record
that it is drawn from: the newest file, by name, of each folder of ``benchmarks/results`` (``cpu``, or a GPU's name)
that has such measurements. Without one it says so.
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.harness.pages import fill
from benchmarks.harness.plots import outdated, redraw
from benchmarks.harness.record import ROOT
from benchmarks.harness.tables import render, sources

PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.split(":")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the page isn't up to date")
    options = parser.parse_args(arguments)
    before = PAGE.read_text()
    after = fill(before, lambda name: render(name, RESULTS))
    drawn = [path for name in ("cpu-plots", "gpu-plots") for path in sources(name, RESULTS)]
    folder = PAGE.parent / "plots"
    if not options.check:
        PAGE.write_text(after)
        redraw(drawn, folder)
    elif after != before or outdated(drawn, folder):
        print(f"{PAGE} isn't what the records say: run `python -m benchmarks.tables`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
