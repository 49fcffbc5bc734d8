"""Offline build of every kernel, in every configuration that ships, for every GPU family: no GPU and no driver needed.

``python -m hycam_kernels.aot [--targets sm_90 gfx942 ...] [--once] [--json FILE]``

Exit status 1 where a kernel spills registers, exceeds the target's shared memory or doesn't compile, or a table's row
is never used; 2 for a wrong argument.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import triton

from hycam_kernels.backends.triton.config_tables import families
from hycam_kernels.backends.triton.offline_builds import attempts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m hycam_kernels.aot", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--targets", nargs="+", choices=families(), default=families(), metavar="TARGET")
    parser.add_argument(
        "--once",
        action="store_true",
        help="build each configuration in the call with the most tensors alone, not in all calls",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the builds as a list of objects")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing")

    print(f"triton {triton.__version__}")
    print(f"{'target':8}{'kernel':24}{'registers':>10}{'spill':>7}{'shared':>8}  {'mma':8} configuration")
    rows, faults = [], []
    for target in options.targets:
        for row, reason in attempts(target, once=options.once):
            if reason:
                faults.append(reason)
            if row is None:
                print(reason)
                continue
            rows.append(row)
            config = " ".join(f"{k}={v}" for k, v in row["config"].items() if k != "absent")
            print(
                f"{target:8}{row['kernel']:24}{row['registers']:>10}{row['spill_bytes']:>7}{row['shared_bytes']:>8}  "
                f"{row['mma']:8} {config}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{len(rows)} builds, {len(faults)} faults")
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
