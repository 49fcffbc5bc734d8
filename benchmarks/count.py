"""Counts of the kernels' machine code, built without a GPU: ``python -m benchmarks.count [--check]``.

Each build of each target that a call at `benchmarks.op.shapes` launches is read loop by loop: instructions issued,
special functions, matrix products, bytes of shared and global memory. With the grids and the rates of
`benchmarks.machine.assumptions` they give each kernel's time on paper, the pipe that sets it, and a whole call's.

The record, ``benchmarks/results/counts.json``, is written anew. ``--check`` writes nothing; exit status 1 where
something isn't as the record has it. ``--targets`` and ``--kernels`` leave out the others, which keep their part of it.
``--others`` counts the builds of all other configurations that ship instead, and prints them alone.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.record import Entry
from benchmarks.machine.assumptions import GPUS
from benchmarks.machine.builds import count, differences
from benchmarks.machine.collect import VERSIONS, call_differences, call_entries, launches, other_launches, peer_entries
from benchmarks.machine.pages import build_lines, kernels
from benchmarks.machine.record import LISTS, RECORD, load, write
from hycam_kernels.backends.triton.config_tables import families

ACCEPT = "python -m benchmarks.count && python -m benchmarks.tables"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.count", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--targets", nargs="+", choices=families(), default=families(), metavar="TARGET")
    parser.add_argument("--kernels", nargs="+", metavar="KERNEL", help="by their functions' names: row_grad_kernel")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a count isn't the record's")
    parser.add_argument(
        "--others", action="store_true", help="count what ships beside the record's builds, and print it"
    )
    parser.add_argument("--record", type=Path, default=RECORD, metavar="FILE", help="another record than the committed")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing")
    of_target = other_launches if options.others else launches
    wanted = [(launch, target) for target in options.targets for launch in of_target(target)]
    if unknown := set(options.kernels or ()) - {launch.name for launch, _ in wanted}:
        parser.error(f"--kernels: there is no {', '.join(sorted(unknown))}")
    everything = set(options.targets) == set(families()) and options.kernels is None
    known: Entry = load(options.record) if options.record.exists() else {**VERSIONS, **dict.fromkeys(LISTS, ())}
    if any(known[name] != version for name, version in VERSIONS.items()) and (options.check or not everything):
        of = {name: known[name] for name in VERSIONS}
        parser.error(f"{options.record} was counted with {of}, here is {VERSIONS}: only all counts together replace it")

    builds = []
    for launch, target in wanted:
        if options.kernels is None or launch.name in options.kernels:
            builds.append(count(launch, target))
            print("\n".join(build_lines(builds[-1])), flush=True)
    if options.others:
        return 0
    content, changes = _joined(known, builds, options.targets, options.kernels)
    print("\n".join([*(kernels(content, target) for target in options.targets if target in GPUS), *changes]))
    if options.check:
        if changes:
            print(*changes, f"{len(changes)} changes; to accept them: {ACCEPT}", sep="\n", file=sys.stderr)
        return 1 if changes else 0
    if everything:
        content["peers"] = peer_entries()
    write(options.record, VERSIONS | content)
    print(f"wrote {options.record}: {len(changes)} changes")
    return 0


def _joined(
    known: Entry, builds: list[Entry], targets: Sequence[str], kernels: Sequence[str] | None
) -> tuple[Entry, list[str]]:
    """The record's lists with these builds and the calls of their targets in place of its own, and what changes."""

    def counted(build: Entry) -> bool:
        return build["target"] in targets and (kernels is None or build["kernel"] in kernels)

    changes = list(differences([build for build in known["builds"] if counted(build)], builds))
    builds = builds + [build for build in known["builds"] if not counted(build)]
    entries = [entry for target in targets if target in GPUS for entry in call_entries(target, builds)]
    changes += call_differences([entry for entry in known["calls"] if entry["target"] in targets], entries)
    entries += [entry for entry in known["calls"] if entry["target"] not in targets]
    return {"builds": builds, "calls": entries, "peers": known["peers"]}, changes


if __name__ == "__main__":
    sys.exit(main())
