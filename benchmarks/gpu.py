"""One command for a machine with a GPU: tests, candidates, the winning table, times. Offline, in under 10 minutes.

``python -m benchmarks.gpu --out DIR [--seconds 560] [--commit HASH[+]]``

Writes into DIR: ``record.json`` (all of it), a table in the format of `hycam_kernels/backends/triton/configs`, and
``tests.log``. Each phase is a process of its own with a time limit; what doesn't fit is skipped, and the record says
so. A failed test withholds nothing but success: each peer is compared with the reference before it is timed. Exit
status 0 only if the tests passed and the times were taken.

The record has every measurement as soon as it is made, whatever ends the run. ``--phase NAME`` runs one phase again, or
one that a run didn't come to: its entries in DIR's record are replaced, the others stay.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.kernel_tests import FOLDER, run_tests
from benchmarks.harness.phases import MARGIN, PHASES, Launch, OtherSourcesError, enter, leave, orchestrate, tables
from benchmarks.harness.processes import end_with, wait
from benchmarks.harness.record import ROOT, Budget, Record, environment, gpu_state
from benchmarks.harness.session import Session
from benchmarks.harness.timing import EventTimer, GraphTimer
from benchmarks.op.measure import QUEUED, measure_decode_floors, measure_op, measure_overhead, measure_rates
from benchmarks.op.shapes import DECODE, LAUNCH, SWEEP, TRAINING, Shape

DTYPE = torch.bfloat16
COPY_BYTES = 1 << 30
OUR_PEERS = ("eager", "torch", "fused", "fused-recompute")
RELEASED_PEERS = ("released", "torch-released", "fused-released")
# a compiler's own time for both passes, before it can be timed
COMPILE_SECONDS = {"compile": 40, "compile-max-autotune": 75}


def times_phase(
    session: Session,
    training: Sequence[Shape] = TRAINING,
    decode: Sequence[Shape] = DECODE,
    decode_session: Session | None = None,
    rate_session: Session | None = None,
    dtype: torch.dtype = DTYPE,
    copy_bytes: int = COPY_BYTES,
    launch: Shape = LAUNCH,
    queued: int = QUEUED,
) -> None:
    """Rates, floors and the package's peers at every shape, the most telling first.

    Args:
        decode_session, rate_session: with timers of their own for decoding, and for what floors are made of.
    """
    measure_rates(rate_session or session, dtype, training, copy_bytes)
    for shape in training:
        measure_op(session, shape, dtype, OUR_PEERS)
        measure_op(session, shape, dtype, RELEASED_PEERS)
    measure_decode_floors(session, dtype, decode)
    for shape in decode:
        measure_op(
            decode_session or session, shape, dtype, ("eager", "torch", "fused"), passes=("inference",), group="decode"
        )
    measure_overhead(session, launch, dtype, ("eager", "torch", "fused"), queued)


def sweep_phase(
    session: Session,
    sweep: Sequence[Shape] = SWEEP,
    rate_session: Session | None = None,
    dtype: torch.dtype = DTYPE,
    copy_bytes: int = COPY_BYTES,
) -> None:
    """The fused op by one size at a time."""
    measure_rates(rate_session or session, dtype, sweep, copy_bytes)
    for shape in sweep:
        measure_op(session, shape, dtype, ("fused",), group="sweep")


def compiled_phase(session: Session, training: Sequence[Shape] = TRAINING, dtype: torch.dtype = DTYPE) -> None:
    """The reference through torch.compile beside the fused op; the compilers take so long that a shape or two fit."""
    for shape in training:
        for name, seconds in COMPILE_SECONDS.items():
            measure_op(session, shape, dtype, ("fused", name), seconds=seconds)


def times_on_gpu(
    record: Record,
    budget: Budget,
    out: Path,
    *,
    training: Sequence[Shape] = TRAINING,
    decode: Sequence[Shape] = DECODE,
    sweep: Sequence[Shape] = SWEEP,
    launch: Shape = LAUNCH,
    copy_bytes: int = COPY_BYTES,
    queued: int = QUEUED,
    rounds: int = 25,
) -> None:
    from benchmarks.op.kernels import measure_kernels  # imports triton, as below

    device = torch.device("cuda", torch.cuda.current_device())
    session = Session(record, budget, device, [GraphTimer(), EventTimer()], rounds)
    chained = Session(record, budget, device, [GraphTimer(chain=4), EventTimer()], rounds)
    # as in a model, where one product follows another: the device's start and end are no part of the rate
    rates = Session(record, budget, device, [GraphTimer(chain=8)], rounds)
    times_phase(session, training, decode, chained, rates, copy_bytes=copy_bytes, launch=launch, queued=queued)
    # before what can do without: the one peer that the op is held to
    compiled_phase(session, training[:1])
    measure_kernels(session, DTYPE, training, decode)
    sweep_phase(session, sweep, rates, copy_bytes=copy_bytes)
    compiled_phase(session, training[1:])
    record.content["gpu_after"] = gpu_state()
    record.write()


def candidates_on_gpu(
    record: Record,
    budget: Budget,
    out: Path,
    *,
    training: Sequence[Shape] = TRAINING,
    decode: Sequence[Shape] = DECODE,
    rounds: int = 15,
) -> None:
    from benchmarks.op.candidates import measure_candidates  # imports triton, which only this phase needs

    device = torch.device("cuda", torch.cuda.current_device())
    measure_candidates(Session(record, budget, device, [GraphTimer()], rounds), out, training, decode)


def models_on_gpu(record: Record, budget: Budget, out: Path, **sizes: Any) -> None:
    """By `end_to_end.measure_on_gpu`, which takes the ``sizes``."""
    from benchmarks.end_to_end import measure_on_gpu  # imports transformers and PEFT, which only this phase needs

    measure_on_gpu(record, budget, **sizes)


Measure = Callable[[Record, Budget, Path], None]
MEASURE: Mapping[str, Measure] = {"candidates": candidates_on_gpu, "times": times_on_gpu, "models": models_on_gpu}


def run_phase(name: str, out: Path, seconds: float, commit: str | None, measure: Measure) -> None:
    """One phase, in this process: with the table that won in ``out``, if any did.

    Raises:
        OtherSourcesError: as `enter`.
    """
    record = enter(out, name, environment(commit))
    if name == "candidates":
        for left in tables(out):
            left.unlink()
    tuned = bool(tables(out))
    if tuned:
        os.environ["HYCAM_KERNELS_TABLES"] = str(out)
    record.content["table"] = "tuned" if tuned else os.environ.get("HYCAM_KERNELS_TABLES", "shipped")
    record.write()
    measure(record, Budget(seconds), out)
    leave(record, name)


def _launch(out: Path, commit: str | None, module: str) -> Launch:
    def launch(name: str, seconds: float) -> int | None:
        command = [sys.executable, "-m", module, "--phase", name, "--out", str(out), "--parent", str(os.getpid())]
        command += ["--seconds", str(seconds - MARGIN)] + ([] if commit is None else ["--commit", commit])
        # what it takes to start, which is long from a cold disk, is of its seconds: it must end by itself
        began = time.monotonic()
        process = subprocess.Popen([*command, "--began", str(began)], cwd=ROOT, start_new_session=True)
        return wait(process, began + seconds)

    return launch


def main(
    arguments: Sequence[str] | None = None,
    *,
    measure: Mapping[str, Measure] = MEASURE,
    tests: Path = FOLDER,
    module: str = "benchmarks.gpu",
) -> int:
    """The command.

    Args:
        measure: by phase, what it measures.
        tests: the folder of the kernel tests.
        module: that is started, by ``python -m``, for a phase's process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the record, the table and the tests' log")
    parser.add_argument("--seconds", type=float, default=560, help="for everything (default: 560)")
    parser.add_argument("--commit", help="of the sources, where there is no repository; a + at its end: changed since")
    parser.add_argument("--phase", choices=PHASES, help="only this phase, in this process, without the tests before it")
    parser.add_argument("--parent", type=int, help="with --phase: end when this process, which started it, has ended")
    parser.add_argument("--began", type=float, help="with --phase: when its seconds began, by the monotonic clock")
    options = parser.parse_args(arguments)
    if options.parent is not None:
        end_with(options.parent)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device: nothing was measured", file=sys.stderr)
        return 1
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.phase:
        gone = 0.0 if options.began is None else time.monotonic() - options.began
        try:
            run_phase(options.phase, out, options.seconds - gone, options.commit, measure[options.phase])
        except OtherSourcesError as error:
            parser.error(f"--out: {error}")
        return 0
    processes = max(1, min(10, (os.cpu_count() or 2) - 2))
    header = environment(options.commit)
    git = header["git"]
    # whatever is committed during the run, its phases are of the sources that it began with
    commit = None if git["commit"] is None else git["commit"] + ("+" if git["dirty"] else "")
    done = orchestrate(
        out,
        header,
        Budget(options.seconds),
        lambda seconds: run_tests(seconds, out / "tests.log", processes=processes, folder=tests),
        _launch(out, commit, module),
    )
    print(json.dumps(json.loads((out / "record.json").read_text())["phases"], indent=1))
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
