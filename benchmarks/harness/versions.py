"""The table of the environments that `make versions` tested, from their records."""

from pathlib import Path

from benchmarks.harness.pages import NOT_MEASURED, markdown
from benchmarks.harness.tables import load

_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "datasets", "trl", "numpy")
_OUTCOMES = ("passed", "failed", "skipped")


def versions(folder: Path) -> str:
    """One row for each environment: the versions in it, and what became of its tests."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        record = load(path)
        found = [record["packages"][name] or "" for name in _PACKAGES]
        counts = [str(sum(entry[outcome] for entry in record["entries"])) for outcome in _OUTCOMES]
        origin = [f"{record['git']['commit'][:12]}, {record['time'][:10]}"]
        rows.append([path.stem, record["python"], *found, *counts, *origin])
    header = ["environment", "Python", *_PACKAGES, *_OUTCOMES, "sources, date"]
    return markdown(header, rows) if rows else NOT_MEASURED
