"""What the installed triton's compilers make of all that ships: ``python -m benchmarks.builds [--out FILE]``.

Every configuration of every target is built once, in the call that gives it the most tensors, as `python -m
hycam_kernels.aot --once` does. Exit status 1 where one spills registers, asks for more shared memory than the target
has, or doesn't compile.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import triton

from benchmarks.harness.record import ROOT, Entry, Record, environment
from hycam_kernels.backends.triton.config_tables import families
from hycam_kernels.backends.triton.offline_builds import attempts

RESULTS = ROOT / "benchmarks" / "results" / "builds"


def count(target: str) -> Entry:
    """How many builds the target has, and a line for each fault."""
    found = list(attempts(target, once=True))
    builds = sum(row is not None for row, _ in found)
    return {"target": target, "builds": builds, "faults": [reason for _, reason in found if reason]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.builds", description=(__doc__ or "").split(":")[0])
    default = RESULTS / f"triton-{triton.__version__}.json"
    parser.add_argument("--out", type=Path, default=default, help=f"the record's file (default: {default.name})")
    options = parser.parse_args(arguments)
    of_all = Record(options.out, environment() | {"triton": triton.__version__})
    for target in families():
        of_all.add(count(target))
        print(f"{target}: {of_all.entries[-1]['builds']} builds", *of_all.entries[-1]["faults"], sep="\n  ", flush=True)
    return 1 if any(entry["faults"] for entry in of_all.entries) else 0


if __name__ == "__main__":
    sys.exit(main())
