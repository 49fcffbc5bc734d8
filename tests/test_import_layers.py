"""What may import what: the law stands in pyproject.toml, under `tool.importlinter`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# import by import: who must not, and which contract says so
BREACHES = {
    "hycam_kernels/philox.py": ("from hycam.errors import InputError", "The packages"),
    "hycam/data/splits.py": ("from hycam.training.schema import Reader", "The rooms of hycam"),
    "hycam/reporting/store.py": ("def load(): from hycam.commands.selection import select", "The rooms of hycam"),
    "hycam/adapter/attention.py": ("from hycam.adapter.binding import Binding", "No circles"),
    "hycam_kernels/backends/torch/modulation.py": (
        "from hycam_kernels.backends.triton.modulation import refusal",
        "The backends don't know each other, but the CPU's stands on torch's",
    ),
    "hycam_kernels/folding.py": ("import numpy", "The op needs torch and triton alone"),
}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    # beside this interpreter: a command of the same name elsewhere would read other packages
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_no_import_runs_up_and_none_in_a_circle():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", BREACHES)
def test_a_breach_is_found(file, tmp_path):
    breach, contract = BREACHES[file]
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in ("hycam", "hycam_kernels", "hycam_cli", "benchmarks"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.json", "__pycache__"))
    with (tmp_path / file).open("a") as source:
        source.write(f"\n{breach}\n")
    done = lint(tmp_path)
    assert done.returncode == 1, done.stdout
    assert f"{contract} BROKEN" in done.stdout
