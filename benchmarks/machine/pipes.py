"""What the instructions of a program ask of a multiprocessor's pipes.

NVIDIA, by name:

=========== ============================================================================================
``issue``   instructions of all warps
``special`` results of the special-function unit: exponentials, reciprocals, conversions, one a lane
``HMMA``    multiply-adds of bfloat16 or float16 by mma.sync; one of tf32, at half the rate, counts twice
``HGMMA``   the same by warp-group products (wgmma)
``UTCHMMA`` the same by tcgen05
``shared``  bytes read and written in shared memory, for a warp's access at least the 128 of a clock; the
            operands of warp-group products and of tcgen05 too
``global``  bytes that loads and stores ask for; what lanes of a warp share counts for each of them
=========== ============================================================================================

AMD: instructions of all waves, ``issue``, and how many of them are matrix products (``MFMA``), transcendental
(``special``), and accesses of local and global memory (``shared``, ``global``).
"""

import re
from collections import Counter
from collections.abc import Sequence

from benchmarks.machine.code import Instruction, Part

Counts = Counter[str]

LANES = 32
WARPGROUP = 4
# bytes of shared memory a clock: what an access of a warp takes at least
WAVEFRONT = 128
# bytes along the depth of a row that a warp-group product or tcgen05 reads
_ROW = 32
_SPECIAL = ("MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV")
_COPY = "LDGSTS"
_SHARED = ("LDS", "STS", "ATOMS", _COPY)
_MATRICES = ("LDSM", "STSM")
_GLOBAL = ("LDG", "STG", "LD", "ST", "RED", "ATOMG", "ATOM", _COPY)
# what these move stands in a descriptor
_UNREADABLE = ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKRED", "UTCCP", "UTCQMMA", "UTCOMMA", "IMMA", "DMMA")
# a loop around these turns until something is ready
_WAITS = ("SYNCS", "UTCATOMSWS")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_AMD_SPECIAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")


def nvidia(parts: Sequence[Part], warps: int) -> tuple[list[int | None], list[Counts]]:
    """For each part of a program of ``warps`` warps: the part around it, and its counts, a loop's for one turn.

    A loop that waits belongs to what is around it, as one turn. A copy to shared memory outside the loop that it is
    pipelined in is the first turns', whose own last ones are predicated off: its bytes are counted in the loop alone,
    but one turn's where the last turn stands behind the loop, as with tcgen05.

    Raises:
        ValueError: what an instruction moves or multiplies can't be read off it.
    """
    counts = [Counter({"issue": warps * len(part.instructions)}) for part in parts]
    copying = _copying(parts)
    for index, part in enumerate(parts):
        before_loop = any(other.inside == index and copying[at] for at, other in enumerate(parts))
        constants: dict[str, int] = {}
        for one in part.instructions:
            if one.predicate != "!PT" and not (one.name == _COPY and before_loop):
                counts[index] += _asked(one, warps, constants)
            _remember(one, constants)
        if part.inside is not None and any(one.name == "UTCHMMA" for one in part.instructions):
            for one in part.instructions:
                if one.name == _COPY:
                    counts[part.inside] += _asked(one, warps, constants)
    return _without_waits(parts, counts)


def amd(parts: Sequence[Part], waves: int) -> tuple[list[int | None], list[Counts]]:
    """For each part of a program of ``waves`` waves: the part around it, and its numbers of instructions."""
    counts = []
    for part in parts:
        found = Counter(name for one in part.instructions for name in _amd_names(one.opcode))
        counts.append(Counter({name: waves * number for name, number in found.items()}))
    return [part.inside for part in parts], counts


def _copying(parts: Sequence[Part]) -> list[bool]:
    """Whether a part, or a loop in it, copies to shared memory."""
    found = [any(one.name == _COPY for one in part.instructions) for part in parts]
    for index, part in enumerate(parts):
        around = part.inside
        while found[index] and around is not None:
            found[around] = True
            around = parts[around].inside
    return found


def _without_waits(parts: Sequence[Part], counts: Sequence[Counts]) -> tuple[list[int | None], list[Counts]]:
    places: dict[int | None, int | None] = {None: None}
    inside: list[int | None] = []
    kept: list[Counts] = []
    # a loop that waits has no loop in it, and stands behind the part around it
    for index, (part, asked) in enumerate(zip(parts, counts, strict=True)):
        around = places[part.inside]
        waits = any(one.name in _WAITS for one in part.instructions) and set(asked) == {"issue"}
        if around is not None and waits:
            kept[around] += asked
            continue
        places[index] = len(kept)
        inside.append(around)
        kept.append(Counter(asked))
    return inside, kept


def _asked(one: Instruction, warps: int, constants: dict[str, int]) -> Counts:
    """What an instruction asks for beside its issue, of all warps."""
    name = one.name
    if name in _UNREADABLE:
        raise ValueError(f"{one.opcode}: what it moves or multiplies can't be read off it")
    asked: Counts = Counter()
    if name in _SPECIAL:
        asked["special"] = LANES * warps
    if name in _SHARED:
        asked["shared"] = max(LANES * _width(one), WAVEFRONT) * warps
    if name in _MATRICES:
        # matrices of 8 rows of 16 bytes: M88 is one, M88.4 four
        asked["shared"] = (
            WAVEFRONT * max((int(part) for part in one.modifiers[1:] if part in ("2", "4")), default=1) * warps
        )
    if name in _GLOBAL:
        asked["global"] = LANES * _width(one) * warps
    if name == "HMMA":
        asked[name] = _mma_sync(one) * warps
    if name == "HGMMA":
        asked = _group_product(one, warps // WARPGROUP)
    if name == "UTCHMMA":
        asked = _tensor_memory_product(one, constants)
    return asked


def _width(one: Instruction) -> int:
    """Bytes a lane."""
    return next((_WIDTHS[part] for part in one.modifiers if part in _WIDTHS), 4)


def _mma_sync(one: Instruction) -> int:
    sizes = re.fullmatch(r"(16)(8)(16|8|4)", one.modifiers[0])
    if sizes is None:
        raise ValueError(f"{one.opcode}: its sizes are not known")
    rows, columns, depth = map(int, sizes.groups())
    return rows * columns * depth * (2 if "TF32" in one.modifiers else 1)


def _group_product(one: Instruction, groups: int) -> Counts:
    """A warp group's product: the left operand comes from registers or shared memory, the right from shared memory."""
    rows, columns, depth = map(int, one.modifiers[0].split("x"))
    read = columns + (rows if "gdesc" in one.operands.split(",")[1] else 0)
    factor = 2 if "TF32" in one.modifiers else 1
    return Counter({one.name: rows * columns * depth * factor * groups, "shared": _ROW * read * groups})


def _tensor_memory_product(one: Instruction, constants: dict[str, int]) -> Counts:
    """tcgen05, which one thread issues for the program: its sizes are in the instruction descriptor."""
    register = re.search(r"idesc\[(UR\d+)\]", one.operands)
    if register is None or register[1] not in constants:
        raise ValueError(f"{one.opcode} {one.operands}: its instruction descriptor is no constant")
    descriptor = constants[register[1]]
    rows, columns = (descriptor >> 24 & 0x1F) << 4, (descriptor >> 17 & 0x3F) << 3
    read = columns + (rows if one.operands.startswith("gdesc") else 0)
    # 16 numbers of 16 bits a row; of tf32 8, which count twice
    return Counter({one.name: rows * columns * (_ROW // 2), "shared": _ROW * read})


def _remember(one: Instruction, constants: dict[str, int]) -> None:
    """The uniform registers that hold a constant."""
    register, _, value = one.operands.partition(", ")
    if one.name == "UMOV" and re.fullmatch(r"0x[0-9a-f]+", value):
        constants[register] = int(value, 16)
    else:
        constants.pop(register, None)


def _amd_names(opcode: str) -> list[str]:
    names = ["issue"]
    if opcode.startswith("v_mfma"):
        names.append("MFMA")
    if _AMD_SPECIAL.match(opcode):
        names.append("special")
    if opcode.startswith("ds_"):
        names.append("shared")
    if opcode.startswith(("global_", "buffer_load", "buffer_store", "buffer_atomic", "flat_")):
        names.append("global")
    return names
