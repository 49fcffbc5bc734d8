"""One command for a machine with a GPU: tests, candidates, the winning table, times. Offline, in under 10 minutes.

``python -m benchmarks.gpu --out DIR [--seconds 560] [--commit HASH[+]]``

Writes into DIR: ``record.json`` (all of it), a table in the format of `hycam_kernels/configs`, and ``tests.log``. Each
phase is a process of its own with a time limit; what doesn't fit is skipped, and the record says so. A failed test
withholds nothing but success: each peer is compared with the reference before it is timed. Exit status 0 only if the
tests passed and the times were taken.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness.kernel_tests import run_tests, wait
from benchmarks.harness.phases import MARGIN, PHASES, Launch, orchestrate
from benchmarks.harness.record import ROOT, Budget, Record, environment, gpu_state
from benchmarks.harness.session import Session
from benchmarks.harness.timing import EventTimer, GraphTimer
from benchmarks.op.measure import measure_decode_floors, measure_op, measure_overhead, measure_rates
from benchmarks.op.shapes import DECODE, LAUNCH, SWEEP, TRAINING, Shape

DTYPE = torch.bfloat16
OUR_PEERS = ("eager", "torch", "fused", "fused-recompute")
RELEASED_PEERS = ("released", "torch-released", "fused-released")
# a compiler's own time for both passes, before it can be timed
COMPILE_SECONDS = {"compile": 40, "compile-max-autotune": 75}


def times_phase(
    session: Session,
    training: Sequence[Shape] = TRAINING,
    decode: Sequence[Shape] = DECODE,
    decode_session: Session | None = None,
    dtype: torch.dtype = DTYPE,
    copy_bytes: int = 1 << 30,
) -> None:
    """Rates, floors and the package's peers at every shape, the most telling first."""
    measure_rates(session, dtype, training, copy_bytes)
    for shape in training:
        measure_op(session, shape, dtype, OUR_PEERS)
        measure_op(session, shape, dtype, RELEASED_PEERS)
    measure_decode_floors(session, dtype, decode)
    for shape in decode:
        measure_op(
            decode_session or session, shape, dtype, ("eager", "torch", "fused"), passes=("inference",), group="decode"
        )
    measure_overhead(session, LAUNCH, dtype, ("eager", "torch", "fused"))


def sweep_phase(
    session: Session, sweep: Sequence[Shape] = SWEEP, dtype: torch.dtype = DTYPE, copy_bytes: int = 1 << 30
) -> None:
    """The fused op by one size at a time."""
    measure_rates(session, dtype, sweep, copy_bytes)
    for shape in sweep:
        measure_op(session, shape, dtype, ("fused",), group="sweep")


def compiled_phase(session: Session, training: Sequence[Shape] = TRAINING, dtype: torch.dtype = DTYPE) -> None:
    """The reference through torch.compile beside the fused op; the compilers take so long that a shape or two fit."""
    for shape in training:
        for name, seconds in COMPILE_SECONDS.items():
            measure_op(session, shape, dtype, ("fused", name), seconds=seconds)


def _times_on_gpu(record: Record, budget: Budget, out: Path) -> None:
    from benchmarks.op.kernels import measure_kernels  # imports triton, as below

    device = torch.device("cuda", torch.cuda.current_device())
    session = Session(record, budget, device, [GraphTimer(), EventTimer()], rounds=25)
    chained = Session(record, budget, device, [GraphTimer(chain=4), EventTimer()], rounds=25)
    times_phase(session, decode_session=chained)
    # before what can do without: the one peer that the op is held to
    compiled_phase(session, TRAINING[:1])
    measure_kernels(session, DTYPE)
    sweep_phase(session)
    compiled_phase(session, TRAINING[1:])
    record.content["gpu_after"] = gpu_state()
    record.write()


def _candidates_on_gpu(record: Record, budget: Budget, out: Path) -> None:
    from benchmarks.op.candidates import measure_candidates  # imports triton, which only this phase needs

    device = torch.device("cuda", torch.cuda.current_device())
    measure_candidates(Session(record, budget, device, [GraphTimer()], rounds=15), out)


def _models_on_gpu(record: Record, budget: Budget, out: Path) -> None:
    from benchmarks.end_to_end import measure_on_gpu  # imports transformers and PEFT, which only this phase needs

    measure_on_gpu(record, budget)


_MEASURE = {"candidates": _candidates_on_gpu, "times": _times_on_gpu, "models": _models_on_gpu}


def run_phase(name: str, out: Path, seconds: float, commit: str | None) -> None:
    """One phase, in this process: its entries go to ``<name>.json``."""
    record = Record(out / f"{name}.json", environment(commit))
    record.write()
    _MEASURE[name](record, Budget(seconds), out)


def _launch(out: Path, commit: str | None) -> Launch:
    def launch(name: str, seconds: float, environ: dict[str, str]) -> int | None:
        command = [sys.executable, "-m", "benchmarks.gpu", "--phase", name, "--out", str(out)]
        command += ["--seconds", str(seconds - MARGIN)] + ([] if commit is None else ["--commit", commit])
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environ, start_new_session=True)
        return wait(process, time.monotonic() + seconds)

    return launch


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the record, the table and the tests' log")
    parser.add_argument("--seconds", type=float, default=560, help="for everything (default: 560)")
    parser.add_argument("--commit", help="of the sources, where there is no repository; a + at its end: changed since")
    parser.add_argument("--phase", choices=PHASES, help="only this phase, in this process, without the tests before it")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device: nothing was measured", file=sys.stderr)
        return 1
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.phase:
        run_phase(options.phase, out, options.seconds, options.commit)
        return 0
    processes = max(1, min(10, (os.cpu_count() or 2) - 2))
    done = orchestrate(
        out,
        environment(options.commit),
        Budget(options.seconds),
        lambda seconds: run_tests(seconds, out / "tests.log", processes=processes),
        _launch(out, options.commit),
    )
    print(json.dumps(json.loads((out / "record.json").read_text())["phases"], indent=1))
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
