"""Times on paper: of a kernel that of the pipe with the most to do, of a call the sum.

Within a kernel the pipes are taken to overlap wholly; between kernels nothing does. Programs are dealt out evenly, and
the multiprocessor that gets one more than another sets the time. What programs ask of global memory is taken to come
from L2. So each pipe's time is its least but L2's, where lanes read what others of their warp read.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.machine import assumptions
from benchmarks.machine.assumptions import Gpu
from benchmarks.op.shapes import floor_us

PIPES = ("issue", "special", "tensor", "shared", "L2", "HBM")


class Bound(NamedTuple):
    """Of one launch.

    Attributes:
        clocks: of one multiprocessor for one program, by the pipes that it has.
        us: microseconds of the launch by pipe.
        resident: programs that a multiprocessor holds.
        waves: the grid over the programs that all of them hold.
    """

    clocks: dict[str, float]
    us: dict[str, float]
    resident: int
    waves: float

    @property
    def pipe(self) -> str:
        return max(self.us, key=lambda name: self.us[name])

    @property
    def time(self) -> float:
        return self.us[self.pipe]


def clocks(counts: Mapping[str, float], gpu: Gpu) -> dict[str, float]:
    """Clocks of one multiprocessor for these counts, by its pipes."""
    tensor = sum(counts.get(name, 0) / rate for name, rate in gpu.multiply_adds.items())
    return {
        "issue": counts.get("issue", 0) / assumptions.ISSUED,
        "special": counts.get("special", 0) / assumptions.SPECIAL,
        "tensor": tensor,
        "shared": counts.get("shared", 0) / assumptions.SHARED_BYTES,
    }


def resident(registers: int, shared_bytes: int, warps: int, gpu: Gpu) -> int:
    """Programs that a multiprocessor holds."""
    registers_a_warp = _round_up(32 * registers, assumptions.REGISTER_UNIT)
    limits = [gpu.programs, gpu.threads // (32 * warps), assumptions.REGISTERS // (registers_a_warp * warps)]
    return min(*limits, gpu.shared // (shared_bytes + assumptions.SHARED_RESERVED))


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def whole(parts: Sequence[Mapping[str, int]], turns: Sequence[float]) -> Counter[str]:
    """Counts of a program from those of its parts, each with how often it runs."""
    total: Counter[str] = Counter()
    for counts, times in zip(parts, turns, strict=True):
        for name, number in counts.items():
            total[name] += number * times  # type: ignore[assignment]  # a mean over programs may be no whole number
    return total


def launch_bound(build: Mapping[str, Any], launch: Mapping[str, Any], gpu: Gpu) -> Bound:
    """Of a launch of the record, with its build."""
    asked = whole([part["counts"] for part in build["parts"]], launch["turns"])
    of_program = clocks(asked, gpu)
    # the multiprocessor with the most programs
    programs = math.ceil(launch["programs"] / gpu.multiprocessors)
    us = {name: programs * number / (1e3 * gpu.clock) for name, number in of_program.items()}
    l2_per_s = gpu.l2_bytes * gpu.multiprocessors * gpu.clock * 1e9
    us["L2"] = 1e6 * launch["programs"] * asked["global"] / l2_per_s
    us["HBM"] = 1e6 * launch["bytes"] / gpu.bytes_per_s
    held = resident(build["registers"], build["shared_bytes"], build["warps"], gpu)
    return Bound(of_program, us, held, launch["programs"] / (held * gpu.multiprocessors))


def operation_us(operation: Mapping[str, Any], gpu: Gpu) -> float:
    """An operation of the library: its arithmetic or its bytes."""
    return floor_us(operation["flops"], operation["bytes"], gpu.flops_per_s, gpu.bytes_per_s)
