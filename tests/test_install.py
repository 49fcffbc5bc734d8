"""What installing this package does to a machine that has other builds of what it needs, and on other systems."""

import json
import os
import platform
import runpy
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import setuptools
from setuptools.command import bdist_wheel, build_ext  # noqa: F401 (before the platform is another)

from benchmarks.harness.versions import promises

ROOT = Path(__file__).parents[1]
# builds of torch, and the triton that came with each
MACHINES = {
    "an image of NVIDIA's": {"torch": "2.11.0a0+eb65b36914.nv26.02", "pytorch-triton": "3.6.0+git9844da95.nv26.2"},
    "AMD": {"torch": "2.11.0+rocm7.1", "triton-rocm": "3.6.0"},
    "Intel": {"torch": "2.11.0+xpu", "triton-xpu": "3.6.0"},
    "a CPU alone": {"torch": "2.11.0+cpu"},
}


def environment(folder: Path, installed: dict[str, str]) -> Path:
    """The Python of a virtual environment that says of itself that it has these packages."""
    venv.create(folder, symlinks=True)
    for name, version in installed.items():
        (site,) = folder.glob("lib/python*/site-packages")
        metadata = site / f"{name.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder / "bin" / "python"


def would_install(python: Path) -> subprocess.CompletedProcess:
    wanted = [f"{name}{floor}" for name, floor in promises().items()]
    # a machine's own settings of pip aren't meant
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--dry-run", "--no-index", "--quiet",
         "--report", "-", *wanted],
        capture_output=True, text=True, env=variables | {"PIP_CONFIG_FILE": os.devnull},
    )  # fmt: skip


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_there_is_taken(machine, tmp_path):
    """Nothing is fetched: no second triton beside the one that came with torch."""
    rest = {name: floor.removeprefix(">=") or "1.0" for name, floor in promises().items()}
    done = would_install(environment(tmp_path, rest | MACHINES[machine]))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["install"] == []


def test_what_is_too_old_is_not(tmp_path):
    rest = {name: floor.removeprefix(">=") or "1.0" for name, floor in promises().items()}
    done = would_install(environment(tmp_path, rest | {"torch": "2.5.1+rocm6.2"}))
    assert done.returncode != 0
    assert "torch" in done.stderr


@pytest.mark.parametrize(
    ("system", "machine", "native"),
    [
        ("linux", "x86_64", True),
        ("linux", "aarch64", False),
        ("darwin", "arm64", False),
        ("darwin", "x86_64", False),
        ("win32", "AMD64", False),
    ],
)
def test_only_x86_64_linux_compiles(system, machine, native, monkeypatch):
    """Elsewhere the wheel has no code of a machine, so that one serves them all."""
    told: dict = {}
    monkeypatch.setattr(setuptools, "setup", told.update)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    assert [len(told["ext_modules"]), len(told["cmdclass"])] == ([1, 2] if native else [0, 0])


# other packages do without these modules of theirs by themselves
_ON_WINDOWS = """
import builtins, sys

there = builtins.__import__

def imported(name, globals=None, *rest, **named):
    if name in ("fcntl", "resource") and (globals or {}).get("__name__", "").startswith("hycam"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return there(name, globals, *rest, **named)

builtins.__import__ = imported
from hycam_cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_without_flock_the_adapter_works_and_runs_are_refused():
    """As on Windows: by one line."""

    def command(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", _ON_WINDOWS, *arguments], capture_output=True, text=True, cwd=ROOT)

    shown = command("env")
    assert shown.returncode == 0, shown.stderr
    assert "torch: the triton backend can't run this call" in " ".join(shown.stdout.split())
    refused = command("train", "demo")
    assert refused.returncode == 2
    assert refused.stderr == (
        "hycam: error: runs and studies lock their folders by flock, which this system hasn't: wanted Linux, macOS, "
        "or WSL on Windows\n"
    )
