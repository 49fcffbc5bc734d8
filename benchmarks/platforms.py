"""What would be installed on other systems and Pythons: ``python -m benchmarks.platforms --out FILE``.

uv resolves the requirements of the package and of its extra `train` for each of them, by the registry's metadata alone,
and takes wheels only, but for those packages that have none. Exit status 1 where one can't be resolved.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.record import ROOT, Entry, Record, environment

SYSTEMS = {
    "Linux, x86-64": "x86_64-manylinux_2_28",
    "Linux, AArch64": "aarch64-manylinux_2_28",
    "macOS, ARM": "aarch64-apple-darwin",
    "Windows, x86-64": "x86_64-pc-windows-msvc",
}
PYTHONS = ("3.11", "3.14")
# in Python alone, and published as sources only
_WITHOUT_WHEELS = ("rouge-score",)


def resolve(platform: str, python: str) -> dict[str, str]:
    """Package -> version; raises `subprocess.CalledProcessError` with uv's reason in ``stderr``."""
    command = ["uv", "pip", "compile", "pyproject.toml", "--extra", "train", "--quiet"]
    command += ["--no-header", "--no-annotate"]
    command += ["--only-binary", ":all:", "--python-platform", platform, "--python-version", python]
    command += [option for name in _WITHOUT_WHEELS for option in ("--no-binary", name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(line.split("==") for line in done.stdout.splitlines())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.platforms", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--out", type=Path, required=True, help="the record's file")
    options = parser.parse_args(arguments)
    record = Record(options.out, environment())
    refused = 0
    for system, platform in SYSTEMS.items():
        for python in PYTHONS:
            entry: Entry = {"system": system, "python": python, "packages": {}}
            try:
                entry["packages"] = resolve(platform, python)
            except subprocess.CalledProcessError as error:
                refused += 1
                entry["refusal"] = error.stderr
                print(f"{system}, Python {python}: {error.stderr}", file=sys.stderr)
            record.add(entry)
    print(f"{len(record.entries) - refused} of {len(record.entries)} resolved; record: {options.out}")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
