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
from hycam_kernels.backends.triton.offline_builds import build, fault, one_of_each_configuration, record

RESULTS = ROOT / "benchmarks" / "results" / "builds"


def count(target: str) -> Entry:
    """The target's builds, and a line for each that has a fault."""
    launches = one_of_each_configuration(record(target).launches)
    faults = []
    for launch in launches:
        try:
            reason = fault(build(launch, target))
        except Exception as error:  # whatever the compiler raises is a fault of this build alone
            reason = f"{type(error).__name__}: {error}"
        if reason:
            faults.append(f"{launch.name} {launch.description()}: {reason}")
    return {"target": target, "builds": len(launches), "faults": faults}


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
