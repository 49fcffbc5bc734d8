"""Records: one JSON file a run, with the machine, the versions, the state of the sources, and every sample."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
_PACKAGES = (
    "torch", "triton", "numpy", "transformers", "peft", "accelerate", "datasets", "trl", "liger-kernel", "pytest",
    "pytest-benchmark",
)  # fmt: skip
_GPU_FIELDS = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw",
    "power.limit",
)  # fmt: skip

Entry = dict[str, Any]


class Budget:
    """Seconds that a phase may take."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        return self._end - self._clock()

    def lasts(self, seconds: float = 0.0) -> bool:
        return self.left > seconds


class Record:
    """A run's record, written anew after each entry: a run that is stopped keeps what it measured.

    Args:
        path: of the JSON file.
        header: what goes before the entries, from `environment`.

    Attributes:
        labels: fields that every entry gets.
    """

    def __init__(self, path: Path, header: Entry) -> None:
        self.path = path
        self.content: Entry = header | {"entries": []}
        self.labels: Entry = {}

    @classmethod
    def read(cls, path: Path) -> "Record":
        """The record that a file holds, to go on with."""
        record = cls(path, {})
        record.content = json.loads(path.read_text())
        return record

    @property
    def entries(self) -> list[Entry]:
        return self.content["entries"]

    def add(self, entry: Entry) -> None:
        self.entries.append(entry | self.labels)
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header = {name: value for name, value in self.content.items() if name != "entries"}
        head = json.dumps(header | {"entries": []}, indent=1).removesuffix("]\n}")
        # an entry a line: a whole run has a thousand of them, and to indent them would take seconds off its time
        entries = ",\n  ".join(map(json.dumps, self.entries))
        write_whole(self.path, f"{head}\n  {entries}\n ]\n}}\n")


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: whenever this process is killed, all of the text is there or what was there before."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def environment(commit: str | None = None) -> Entry:
    """The machine, the versions and the state of the sources.

    Args:
        commit: of the sources, for a copy of the tree that has no repository; a "+" at its end marks changes since.
    """
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]],
        "git": _git(commit),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": {"name": _cpu_name(), "threads": torch.get_num_threads(), "load_average": os.getloadavg()},
        "gpu": _gpu() if torch.cuda.is_available() else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(commit: str | None) -> Entry:
    if commit is not None:
        return {"commit": commit.removesuffix("+"), "dirty": commit.endswith("+")}
    try:
        head, status = (
            subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": head, "dirty": bool(status)}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def _gpu() -> Entry:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "found": gpu_state(),
    }


def gpu_state() -> dict[str, str]:
    """Driver, clocks, temperature and power as nvidia-smi reports them at this moment."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return {"unreadable": f"nvidia-smi: {error}"}
    return dict(zip(_GPU_FIELDS, (value.strip() for value in line.split(",")), strict=False))
