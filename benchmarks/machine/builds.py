"""The builds that are counted, what is kept of each, and how two records of them differ."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from benchmarks.harness.record import Entry
from benchmarks.machine import pipes
from benchmarks.machine.code import parse_amdgcn, parse_sass
from hycam_kernels.backends.triton.offline_builds import Launch, compile_launch


def describe(launch: Launch) -> str:
    """What tells the launch's build from its kernel's others."""
    description = launch.description()
    absent = description.pop("absent")
    # sizes of 1 are constants too, and those that aren't multiples of 16 cost instructions
    ones = [name for name, value in launch.constants if value == 1 and name.islower()]
    odd = [name for name, kind in launch.signature if kind.startswith("i") and name not in launch.aligned]
    words = [f"{name}={value}" for name, value in description.items()]
    lists = {"one": ones, "odd": odd, "absent": absent}
    return " ".join(words + [f"{name}={','.join(names)}" for name, names in lists.items() if names])


def identity(kernel: str, config: str) -> str:
    """A short name of a build, of the same kernel and configuration on every target."""
    return f"{kernel}-{hashlib.sha256(config.encode()).hexdigest()[:8]}"


def count(launch: Launch, target: str) -> Entry:
    """Compile a launch for a target and count its instructions.

    Returns:
        ``target``, ``build`` (`identity`), ``kernel``, ``config``, ``warps``, ``registers``, ``spill_bytes``,
        ``shared_bytes`` and ``parts``: what no loop contains, then each loop, ``inside`` the part of that index, with
        its ``counts`` (`pipes`).
    """
    config = describe(launch)
    warps = dict(launch.options)["num_warps"]
    try:
        binary = compile_launch(launch, target)
        if target.startswith("sm_"):
            inside, counts = pipes.nvidia(parse_sass(binary.code), warps)
        else:
            inside, counts = pipes.amd(parse_amdgcn(binary.code), warps)
    except Exception as error:
        error.add_note(f"{target} {launch.name}: {config}")
        raise
    return {
        "target": target,
        "build": identity(launch.name, config),
        "kernel": launch.name,
        "config": config,
        "warps": warps,
        "registers": binary.registers,
        "spill_bytes": binary.spill_bytes,
        "shared_bytes": binary.shared_bytes,
        "parts": [
            {"inside": at, "counts": dict(sorted(found.items()))} for at, found in zip(inside, counts, strict=True)
        ],
    }


def key(build: Mapping[str, Any]) -> tuple[str, str]:
    return build["target"], build["build"]


def differences(before: Iterable[Entry], after: Iterable[Entry]) -> Iterator[str]:
    """One line for each count of a build that isn't what it was; builds that only one side has are named too."""
    known = {key(build): build for build in before}
    found = {key(build): build for build in after}
    for at in sorted(known.keys() | found.keys()):
        old, new = known.get(at), found.get(at)
        if old is None or new is None:
            build = old or new
            assert build is not None
            yield f"{_title(build)}: {'is no longer built' if new is None else 'is not in the record'}"
            continue
        for name, was, now in _amounts(old, new):
            if was != now:
                yield f"{_title(new)}: {name} {'grew' if now > was else 'fell'} from {was} to {now}"


def _title(build: Entry) -> str:
    return f"{build['target']} {build['kernel']} ({build['config']})"


def _amounts(old: Entry, new: Entry) -> Iterator[tuple[str, int, int]]:
    for name in ("registers", "spill_bytes", "shared_bytes"):
        yield name, old[name], new[name]
    if [part["inside"] for part in old["parts"]] != [part["inside"] for part in new["parts"]]:
        yield "loops", len(old["parts"]) - 1, len(new["parts"]) - 1
        return
    for index, (was, now) in enumerate(zip(old["parts"], new["parts"], strict=True)):
        place = f"a turn of loop {index}" if index else "outside loops"
        for name in sorted(was["counts"].keys() | now["counts"].keys()):
            yield f"{name}, {place},", was["counts"].get(name, 0), now["counts"].get(name, 0)
