"""Instructions and loops of a kernel: NVIDIA's machine code as nvdisasm prints it, AMD's assembly as triton gives it.

Loops are the natural loops of the control flow (Aho, Lam, Sethi and Ullman, 2006, 9.6): a branch back to a block that
every way to the branch goes through. A block that the compiler put behind the kernel's end and that jumps back is none.
What only calls reach (the slow path of a division) isn't part of the code: it runs for few operands, if ever.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction of a warp.

    Attributes:
        opcode: with its modifiers, ``LDG.E.128``.
        predicate: ``P0`` or ``!P0``; "" without one. ``!PT`` never holds.
    """

    opcode: str
    operands: str = ""
    predicate: str = ""

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]


class Part(NamedTuple):
    """The instructions of one loop without those of the loops in it; the first part is what no loop contains.

    Attributes:
        inside: index of the part around it; None for the first.
    """

    inside: int | None
    instructions: list[Instruction]


class Flow(NamedTuple):
    """Where control goes after an instruction: to labels, and to the next instruction or not."""

    labels: tuple[str, ...]
    falls_through: bool


Listing = list[Instruction | str]  # a string is a label

_SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_SASS_LABEL = re.compile(r"^\s*(\.L\w+):")
_SASS_TARGET = re.compile(r"`\((\.L\w+)\)")
_AMD = re.compile(r"^\s+([a-z]\w+)(?:\s+([^;]*?))?\s*(?:;.*)?$")
_AMD_LABEL = re.compile(r"^(\.?L\w+):")


def parse_sass(text: str) -> list[Part]:
    """The parts of the one kernel that ``nvdisasm -c`` printed.

    Raises:
        ValueError: it has no instruction, or jumps where the text doesn't say.
    """
    return _parts(_listing(text, _SASS_LABEL, _sass_instruction), _sass_flow)


def parse_amdgcn(text: str) -> list[Part]:
    """The parts of the one kernel of triton's ``amdgcn``.

    Raises:
        ValueError: it has no instruction, or jumps where the text doesn't say.
    """
    return _parts(_listing(text.partition(".Lfunc_end0")[0], _AMD_LABEL, _amd_instruction), _amd_flow)


def _listing(text: str, label: re.Pattern[str], read: Callable[[str], Instruction | None]) -> Listing:
    found: Listing = []
    for line in text.splitlines():
        if name := label.match(line):
            found.append(name[1])
        elif instruction := read(line):
            found.append(instruction)
    return found


def _sass_instruction(line: str) -> Instruction | None:
    found = _SASS.search(line)
    return Instruction(found[2], found[3], found[1] or "") if found else None


def _sass_flow(instruction: Instruction) -> Flow:
    always = instruction.predicate in ("", "PT", "UPT")
    if instruction.name in ("EXIT", "RET"):
        return Flow((), not always)
    if instruction.name in ("BRX", "BRXU", "JMX", "JMXU"):
        raise ValueError(f"{instruction.opcode} {instruction.operands}: an indirect jump can't be followed")
    if instruction.name in ("BRA", "JMP"):
        (label,) = _SASS_TARGET.findall(instruction.operands)
        # a condition may stand among the operands too: BRA.U !UP0, `(.L_x_1)
        return Flow((label,), not always or not instruction.operands.startswith("`"))
    if instruction.name == "CALL" and (labels := _SASS_TARGET.findall(instruction.operands)):
        # the way out of a loop is one at times, which never returns
        return Flow(tuple(labels), True)
    return Flow((), True)


def _amd_instruction(line: str) -> Instruction | None:
    found = _AMD.match(line)
    return Instruction(found[1], found[2] or "") if found else None


def _amd_flow(instruction: Instruction) -> Flow:
    opcode = instruction.opcode
    if opcode == "s_endpgm":
        return Flow((), False)
    if opcode in ("s_setpc_b64", "s_swappc_b64"):
        raise ValueError(f"{opcode} {instruction.operands}: an indirect jump can't be followed")
    if opcode == "s_branch" or opcode.startswith("s_cbranch"):
        return Flow((instruction.operands,), opcode != "s_branch")
    return Flow((), True)


def _parts(listing: Listing, flow: Callable[[Instruction], Flow]) -> list[Part]:
    blocks, successors = _blocks(listing, flow)
    if not any(blocks):
        raise ValueError("machine code: there is no instruction in it")
    dominators = _dominators(successors)
    loops = _loops(successors, dominators)
    number = {header: index for index, header in enumerate(sorted(loops), start=1)}

    def part_of(block: int, *, around: bool = False) -> int:
        """Index of the innermost loop that has the block; ``around`` the one that the block begins."""
        having = [header for header, body in loops.items() if block in body and not (around and header == block)]
        return number[min(having, key=lambda header: len(loops[header]))] if having else 0

    parts = [Part(None, []), *(Part(part_of(header, around=True), []) for header in number)]
    for block in sorted(dominators):
        parts[part_of(block)].instructions.extend(blocks[block])
    return parts


def _blocks(listing: Listing, flow: Callable[[Instruction], Flow]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """The basic blocks, and the indices of each one's successors."""
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    ends: dict[int, Flow] = {}
    for item in listing:
        if isinstance(item, str):
            if blocks[-1]:
                blocks.append([])
            labels[item] = len(blocks) - 1
            continue
        blocks[-1].append(item)
        goes = flow(item)
        if goes.labels or not goes.falls_through:
            ends[len(blocks) - 1] = goes
            blocks.append([])
    successors = []
    for index in range(len(blocks)):
        goes = ends.get(index, Flow((), True))
        if missing := [label for label in goes.labels if label not in labels]:
            raise ValueError(f"machine code: it jumps to {missing[0]}, which isn't in it")
        next_block = [index + 1] if goes.falls_through and index + 1 < len(blocks) else []
        successors.append([labels[label] for label in goes.labels] + next_block)
    return blocks, successors


def _dominators(successors: list[list[int]]) -> dict[int, set[int]]:
    """For each block that the entry reaches, the blocks on every way to it."""
    reached = [0]
    for block in reached:
        reached += [after for after in dict.fromkeys(successors[block]) if after not in reached]
    before = _predecessors(successors, reached)
    dominators = {block: set(reached) for block in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in reached[1:]:
            found = set.intersection(*(dominators[other] for other in before[block])) | {block}
            changed |= found != dominators[block]
            dominators[block] = found
    return dominators


def _predecessors(successors: list[list[int]], blocks: Iterable[int]) -> dict[int, list[int]]:
    before = defaultdict(list)
    for block in blocks:
        for after in successors[block]:
            before[after].append(block)
    return before


def _loops(successors: list[list[int]], dominators: dict[int, set[int]]) -> dict[int, set[int]]:
    """The blocks of each natural loop by its first block; branches back to one block are one loop."""
    before = _predecessors(successors, dominators)
    loops: dict[int, set[int]] = {}
    for block in dominators:
        for header in set(successors[block]) & dominators[block]:
            body = loops.setdefault(header, {header})
            waiting = [block]
            while waiting:
                other = waiting.pop()
                if other not in body:
                    body.add(other)
                    waiting += before[other]
    return loops
