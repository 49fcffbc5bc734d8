"""How much of its own memory a process takes, for the tests that bound it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_STATUS = Path("/proc/self/status")
needs_proc = pytest.mark.skipif(not _STATUS.exists(), reason="reads the process's memory from /proc")


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def last_number(script: str, *arguments: str) -> int:
    """What a script in a process of its own prints last."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])
