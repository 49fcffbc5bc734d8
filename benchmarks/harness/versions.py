"""The tables of what is promised of other packages: what `make versions` tested, and what resolves elsewhere."""

import json
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.harness.pages import NOT_MEASURED, markdown
from benchmarks.harness.record import ROOT
from benchmarks.harness.tables import load
from hycam_kernels.versions import release

USER_EXTRAS = ("train", "analysis", "deepspeed", "flash-attn", "gguf", "liger", "quantization")
_OUTCOMES = ("passed", "failed", "skipped")
_RESOLVED = ("torch", "triton", "transformers", "peft", "accelerate", "datasets", "numpy")


def promises() -> dict[str, str]:
    """Package -> the specifier under which pyproject.toml promises it to a user, "" where it promises no version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"]]
    for extra in USER_EXTRAS:
        lines += project["optional-dependencies"][extra]
    wanted = [Requirement(line) for line in lines]
    return {canonicalize_name(each.name): str(each.specifier) for each in wanted if each.name != project["name"]}


def versions(folder: Path) -> str:
    """One column for each environment, oldest torch first: the versions in it, and what became of its tests."""
    records = {path.stem: load(path) for path in folder.glob("*.json")}
    if not records:
        return NOT_MEASURED
    order = sorted(records, key=lambda name: (release(records[name]["packages"]["torch"]), name))
    wanted = promises()
    rows = [["Python", ">=3.11", *(records[name]["python"] for name in order)]]
    for package in dict.fromkeys([*wanted, "triton", "trl"]):
        found = [records[name]["packages"].get(package) or "" for name in order]
        rows.append([package, wanted.get(package, ""), *found])
    for outcome in _OUTCOMES:
        counts = [str(sum(entry[outcome] for entry in records[name]["entries"])) for name in order]
        rows.append([f"tests {outcome}", "", *counts])
    origins = [f"{records[name]['git']['commit'][:12]}, {records[name]['time'][:10]}" for name in order]
    return markdown(["", "promised", *order], [*rows, ["sources, date", "", *origins]])


def builds(folder: Path) -> str:
    """One row for each triton that built all that ships: builds by target, and how many of them have a fault."""
    records = sorted((load(path) for path in folder.glob("*.json")), key=lambda record: release(record["triton"]))
    if not records:
        return NOT_MEASURED
    rows = []
    for record in records:
        cells = [f"{entry['builds']}, {len(entry['faults'])}" for entry in record["entries"]]
        rows.append([record["triton"], *cells])
    return markdown(["triton", *(entry["target"] for entry in records[0]["entries"])], rows)


def platforms(path: Path) -> str:
    """One row for each system and Python: the versions that would be installed there."""
    if not path.exists():
        return NOT_MEASURED
    rows = []
    for entry in json.loads(path.read_text())["entries"]:
        found: dict[str, Any] = entry["packages"]
        rows.append([entry["system"], entry["python"], *(found.get(name, "") for name in _RESOLVED)])
    return markdown(["system", "Python", *_RESOLVED], rows)
