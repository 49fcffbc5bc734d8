"""Tables and plots of README and pages of `docs/` from records: ``python -m benchmarks.tables [--check]``.

A table, or the plots of a record, stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. Each names the record
that it is drawn from: the newest file, by name, of each folder of ``benchmarks/results`` (``cpu``, or a GPU's name)
that has such measurements. Without one it says so. The tables of versions and of builds are drawn from every file of
their folder, that of platforms from its one record, those named ``counts-`` from `benchmarks.count`'s.
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.harness.pages import fill
from benchmarks.harness.plots import outdated, redraw
from benchmarks.harness.record import ROOT
from benchmarks.harness.tables import TABLES, render, sources
from benchmarks.harness.versions import builds, platforms, versions
from benchmarks.machine import pages as counts
from benchmarks.machine.record import RECORD

DOCS = ROOT / "docs"
_NAMES = ("performance.md", "versions.md", "kernels.md", "kernels-norm-decode.md")
PAGES = (*(DOCS / name for name in _NAMES), ROOT / "README.md")
PLOTS = DOCS / "plots"
RESULTS = ROOT / "benchmarks" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.split(":")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the page isn't up to date")
    options = parser.parse_args(arguments)
    drawn = [path for name in ("cpu-plots", "gpu-plots") for path in sources(name, RESULTS)]
    before = {page: page.read_text() for page in PAGES}
    after = {page: fill(text, _draw) for page, text in before.items()}
    if not options.check:
        for page, text in after.items():
            page.write_text(text)
        redraw(drawn, PLOTS)
        return 0
    stale = [page.name for page in PAGES if after[page] != before[page]]
    stale += [PLOTS.name] if outdated(drawn, PLOTS) else []
    if stale:
        print(f"{', '.join(stale)}: not what the records say, run `python -m benchmarks.tables`", file=sys.stderr)
    return 1 if stale else 0


def _draw(name: str) -> str | None:
    if name == "versions":
        return versions(RESULTS / "versions")
    if name == "builds":
        return builds(RESULTS / "builds")
    if name == "platforms":
        return platforms(RESULTS / "platforms.json")
    if name in counts.TABLES:
        return counts.draw(name, RESULTS / RECORD.name)
    return render(name, RESULTS) if name in TABLES else None


if __name__ == "__main__":
    sys.exit(main())
