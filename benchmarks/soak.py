"""Two processes on a CPU, killed at random and resumed, against an undisturbed run: ``python -m benchmarks.soak``.

One run is left alone. Then runs of the same recipe are begun, each with SIGKILLs at random times, to one process or to
both, and resumed after each until it is done; its losses, test metrics and adapter must be the undisturbed run's, bit
for bit. Runs follow each other until the time is up. Exit status 1 where one differs, hangs or can't be resumed.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.record import Record, environment
from benchmarks.models.soak import PROCESSES, SoakError, prepare, soak
from hycam.environment import package_versions


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="how long runs are disturbed (default: 30)")
    parser.add_argument("--out", type=Path, required=True, help="the record's file")
    parser.add_argument("--steps", type=int, default=200, help="of a run (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the kills (default: 0)")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds until a run counts as hung (default: 600)")
    options = parser.parse_args(arguments)
    header = environment() | {"versions": package_versions(), "minutes": options.minutes, "seed": options.seed}
    record = Record(options.out, header | {"steps": options.steps, "processes": PROCESSES})
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(Path(folder), options.steps, options.limit)
        try:
            alike = soak(prepared, record, 60 * options.minutes, options.seed)
        except SoakError as error:
            record.content["error"] = str(error)
            record.write()
            print(error, file=sys.stderr)
            return 1
    print(f"{record.content['kills_survived']} kills survived in {record.content['runs']} runs; record: {options.out}")
    return 0 if alike else 1


if __name__ == "__main__":
    sys.exit(main())
