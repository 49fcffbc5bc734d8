"""What the op's structure and block sizes are chosen by: library products, then every candidate row of every kernel."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness.record import write_whole
from benchmarks.harness.session import Session, dtype_name
from benchmarks.op.shapes import DECODE, TRAINING, Shape
from benchmarks.op.structures import measure_structures
from hycam_kernels.backends.triton import modulation as triton_backend
from hycam_kernels.backends.triton.tuned_table import table_text, winners
from hycam_kernels.backends.triton.tuning import DECODE_TOKENS, Measurement, Size, Tuner, make_call

DTYPE = torch.bfloat16


def measure_candidates(
    session: Session, out: Path, training: Sequence[Shape] = TRAINING, decode: Sequence[Shape] = DECODE
) -> None:
    """Measure at the training and decode shapes, and write the winning table of the device's family into a folder."""
    launcher = triton_backend.launcher(session.device)
    for shape in training:
        measure_structures(session, shape, DTYPE, launcher.table, inline_assembly=launcher.inline_assembly)
    tuner = Tuner(
        launcher.table,
        keep_on=lambda: session.budget.lasts(5),
        processors=torch.cuda.get_device_properties(session.device).multi_processor_count,
        inline_assembly=launcher.inline_assembly,
    )
    sizes = [Size(*shape.as_dict().values()) for shape in (*training, *decode)]
    search(tuner, session, sizes, out / f"{launcher.family}.json")


def search(tuner: Tuner, session: Session, sizes: Sequence[Size], table: Path, dtype: torch.dtype = DTYPE) -> None:
    """Measure every candidate at every size, as far as the budget lasts; after each kernel, write the winning table."""

    def call(size: Size):
        return make_call(size, dtype, session.device, training=size.tokens > DECODE_TOKENS)

    candidates = tuner.candidates(sizes, call)
    for size in sizes:
        shape = Shape(*size)
        if not session.starts(5, "candidate", shape):
            continue
        x = call(size)
        tuner.compile_ahead(size, x, candidates, workers=os.cpu_count() or 1)
        tuner.run(size, x, candidates, partial(_report, session, tuner, shape, dtype, table))
        _write(tuner, table)
        if not tuner.keep_on():
            session.add("candidate", shape, skipped="out of time: not every candidate was measured")


def _report(session: Session, tuner: Tuner, shape: Shape, dtype: torch.dtype, table: Path, found: Measurement) -> None:
    session.add(
        "candidate", shape, dtype=dtype_name(dtype), **{"pass": found.pass_}, kernel=found.kernel, row=found.row,
        median_us=found.median_us, refusal=found.refusal,
    )  # fmt: skip
    # a search that is killed leaves the table of the kernels before, too
    if tuner.found[-2:-1] and tuner.found[-2].kernel != found.kernel:
        _write(tuner, table)


def _write(tuner: Tuner, table: Path) -> None:
    write_whole(table, table_text(winners(tuner.found, tuner.table)))
