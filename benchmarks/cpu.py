"""The torch backend against plain autograd on a CPU, peers in turn: ``python -m benchmarks.cpu --out FILE``.

Ratios within one record are meaningful as far as their spread says; times of a shared machine are not. Where other
processes are busy, ``--cpu-time`` counts this process's own processor time, on one thread.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .measure import Session, measure_op, measure_overhead, measure_rates
from .record import Budget, Record, environment
from .shapes import CPU, LAUNCH, Shape
from .timing import HostTimer

PAPER_PEERS = ("eager", "torch", "torch-recompute")
RELEASED_PEERS = ("released", "torch-released")
DTYPES = (torch.float32, torch.bfloat16)


def measure(session: Session, shapes: Sequence[Shape] = CPU, copy_bytes: int = 1 << 26) -> None:
    """Rates and floors, the op's passes, memory, and the overhead per call."""
    for dtype in DTYPES:
        measure_rates(session, dtype, shapes, copy_bytes)
        for shape in shapes:
            measure_op(session, shape, dtype, PAPER_PEERS)
            measure_op(session, shape, dtype, RELEASED_PEERS)
    measure_overhead(session, LAUNCH, torch.float32, ("eager", "torch"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.split(":")[0])
    parser.add_argument("--out", type=Path, required=True, help="the record's file")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each time (default: 15)")
    parser.add_argument("--seconds", type=float, default=300, help="for everything (default: 300)")
    parser.add_argument("--cpu-time", action="store_true", help="processor time on one thread, for a busy machine")
    options = parser.parse_args(arguments)
    if options.cpu_time:
        torch.set_num_threads(1)
    record = Record(options.out, environment())
    record.write()
    measure(
        Session(
            record, Budget(options.seconds), torch.device("cpu"), [HostTimer(cpu_time=options.cpu_time)], options.rounds
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
