"""Opt-in tuner: measures block sizes on the GPU at hand and writes a table of one's own.

``python -m hycam_kernels.tune --out FOLDER [--tokens 2400 8192] [--dim 4096] [--experts 5] [--rank 64]``

The table is used by processes that have ``HYCAM_KERNELS_TABLES=FOLDER`` in their environment.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from hycam_kernels.backends.triton import modulation as triton_backend
from hycam_kernels.backends.triton.config_tables import family_of
from hycam_kernels.backends.triton.tuned_table import table_text, winners
from hycam_kernels.backends.triton.tuning import DECODE_TOKENS, Size, Tuner, make_call
from hycam_kernels.inputs import ModulationInputs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hycam_kernels.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the table, for HYCAM_KERNELS_TABLES")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2400, 8192])
    parser.add_argument("--dim", type=int, nargs="+", default=[4096])
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--rank", type=int, default=64)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: no CUDA device: block sizes can only be measured on the GPU that will run them", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    family = family_of(device)
    if family is None:
        print(f"tune: {torch.cuda.get_device_name(device)}: no table to start from is shipped for it", file=sys.stderr)
        return 1
    sizes = [Size(tokens, d, options.experts, options.rank) for tokens in options.tokens for d in options.dim]
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    launcher = triton_backend.launcher(device)
    tuner = Tuner(launcher.table, processors=processors, inline_assembly=launcher.inline_assembly)

    def call(size: Size) -> ModulationInputs:
        return make_call(size, torch.bfloat16, device, training=size.tokens > DECODE_TOKENS)

    candidates = tuner.candidates(sizes, call)
    for size in sizes:
        x = call(size)
        tuner.compile_ahead(size, x, candidates, workers=os.cpu_count() or 1)
        tuner.run(size, x, candidates)
        print(f"{size}: {len(tuner.found)} candidates measured", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{family}.json"
    path.write_text(table_text(winners(tuner.found, tuner.table)))
    print(f"wrote {path}; use it with HYCAM_KERNELS_TABLES={options.out.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
