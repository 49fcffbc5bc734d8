"""`make gpu` without a GPU: ``TRITON_INTERPRET=1 python -m tests.benchmarks.rehearsal --out DIR``.

The command is the real one with its options, down to each measurement. In every process of it a fake device stands for
the GPU, triton's interpreter for what runs its kernels, and the CPU's clock for its events; sizes are tiny, the kernel
tests a few. What is measured says nothing of any machine.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.harness.kernel_tests import FOLDER
from benchmarks.op.shapes import Shape
from tests.benchmarks.fake_cuda import FakeGpu

# training is of more tokens than decoding
SIZES = {"training": (Shape(65, 32, 2, 16),), "decode": (Shape(2, 32, 2, 16),)}
SWEEP = (Shape(96, 32, 2, 16),)
LAUNCH = Shape(8, 32, 2, 16)
# what holds a batch of 256 tokens at the longest row's vocabulary, and not one of 512
MEMORY = 6 << 20
_TESTS = (
    "test_platforms.py",
    "backends/triton/conftest.py",
    "backends/triton/test_interpreter_bfloat16.py",
)


def models_on_gpu(*run) -> None:
    from benchmarks.models.backbones import ModelShape  # imports transformers, as there

    tiny = ModelShape("tiny-llama", 1, 16, num_experts=2, rank=16, layers=1)
    wordy = replace(tiny, vocabulary=4096)
    gpu.models_on_gpu(*run, models=[tiny], generation=[tiny], new_tokens=4, layers=[tiny], longest=wordy, rounds=2)


MEASURE: Mapping[str, gpu.Measure] = {
    "candidates": partial(gpu.candidates_on_gpu, **SIZES, rounds=2),
    "times": partial(gpu.times_on_gpu, **SIZES, sweep=SWEEP, launch=LAUNCH, copy_bytes=1 << 20, queued=2, rounds=2),
    "models": models_on_gpu,
}


def main(arguments: Sequence[str] | None = None) -> int:
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("rehearsal: TRITON_INTERPRET=1 must be in the environment: torch imports triton before anything here")
    from triton.runtime import driver

    from tests.kernels.backends.triton import interpreter_bfloat16

    interpreter_bfloat16.repair()
    driver.set_active(FakeGpu(pytest.MonkeyPatch(), MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        for name in _TESTS:
            copy = Path(folder, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(FOLDER / name, copy)
        return gpu.main(arguments, measure=MEASURE, tests=Path(folder), module="tests.benchmarks.rehearsal")


if __name__ == "__main__":
    sys.exit(main())
