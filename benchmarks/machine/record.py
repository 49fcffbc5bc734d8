"""The record of counts, ``benchmarks/results/counts.json``: builds, whole calls, and what these are held to.

It has the versions of triton and torch, and

``builds``
    that the calls below launch, on every target: `builds.count`.
``calls``
    of each target and shape: ``launches`` with their build, the programs of their grid, the ``turns`` of each part of
    the code, and what they must move and compute (`Cost`); ``operations`` of the library.
``peers``
    the operations of plain PyTorch, and of torch.compile's graph (`inductor`), at the shapes of training.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.record import ROOT, Entry
from benchmarks.op.shapes import TRAINING

RECORD = ROOT / "benchmarks" / "results" / "counts.json"
LISTS = ("builds", "calls", "peers")
# the target and the shapes that the pages' tables of kernels are of
TARGET = "sm_90"
SHOWN = tuple(shape for shape in TRAINING if shape.d == 4096)


def load(path: Path = RECORD) -> Entry:
    return json.loads(path.read_text())


def write(path: Path, content: Mapping[str, Any]) -> None:
    """JSON with a line for each build, call and peer, in the order of their names."""
    parts = []
    for name, value in content.items():
        if isinstance(value, list):
            lines = ",\n".join(sorted(f"  {json.dumps(entry)}" for entry in value))
            parts.append(f' "{name}": [\n{lines}\n ]')
        else:
            parts.append(f' "{name}": {json.dumps(value)}')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
