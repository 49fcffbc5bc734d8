"""``python -m benchmarks.compare OLD NEW [--relative] [--threshold 0.03]``: ratios of two records, and a gate.

Prints new / old of every median with the 95 % interval that its samples leave (bootstrap). Exit status 1 where one of
the package's own peers is slower, needs more memory or fits a shorter row than before, beyond threshold and noise, or
has no result any more; 2 for records that can't be compared. On a shared machine use ``--relative``: each sample is
divided by that of the first peer it took turns with.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.comparison import Incomparable, compare


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.split("\n\n")[1])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--relative", action="store_true", help="to the first peer of each turn, not absolute times")
    parser.add_argument("--threshold", type=float, default=0.03, help="share that is no regression (default: 0.03)")
    options = parser.parse_args(arguments)
    old, new = (json.loads(path.read_text()) for path in (options.old, options.new))
    try:
        ratios, lost = compare(old, new, relative=options.relative)
    except Incomparable as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    for ratio in ratios:
        mark = "  REGRESSION" if ratio.regressed(options.threshold) else ""
        print(f"{ratio.value:6.3f} [{ratio.low:.3f}, {ratio.high:.3f}]  {ratio.label}{mark}")
    for name in lost:
        print(f"  none any more: {name}  REGRESSION")
    return 1 if lost or any(ratio.regressed(options.threshold) for ratio in ratios) else 0


if __name__ == "__main__":
    sys.exit(main())
