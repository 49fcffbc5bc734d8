"""How often a program runs the loops of a kernel: a mean over the programs of a launch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from triton import cdiv

from benchmarks.harness.record import Entry
from hycam_kernels.backends.triton.kernels.sum_parts import MAX_SUMS

Values = Mapping[str, Any]  # a launch's arguments, blocks and constants by name
Grid = tuple[int, ...]


class Loop(NamedTuple):
    """A loop as the kernel's source has it.

    Attributes:
        turns: of a program that runs it.
        share: of the programs that do.
        bytes: that a turn asks of global memory, where that tells how many turns the compiler made one of.
        constant: whether the compiler knows the turns, and may leave no loop.
    """

    turns: float
    share: float = 1.0
    bytes: int | None = None
    constant: bool = False


def _features(values: Values, block: str = "BLOCK_D") -> int:
    return cdiv(values["d"], values[block])


def _tokens(values: Values) -> int:
    return cdiv(values["tokens"], values["BLOCK_T"])


def _router(values: Values, grid: Grid) -> list[Loop]:
    return [] if values["hidden"] is None else [Loop(_features(values))]


def _columns(values: Values) -> Loop:
    """The blocks of a split of d, a mean over the splits."""
    return Loop(_features(values) / cdiv(values["d"], values["columns"]))


def _stream(values: Values, grid: Grid) -> list[Loop]:
    """Through the features with every V at hand, or of one block through the experts."""
    return [_columns(values) if values["RESIDENT"] else Loop(values["NUM_EXPERTS"], constant=True)]


def _product_forward(values: Values, grid: Grid) -> list[Loop]:
    strips = values["BLOCK_D"] // values["BLOCK_STRIP"]
    return [Loop(_features(values, "BLOCK_K")), *[Loop(values["NUM_EXPERTS"], constant=True)] * strips]


def _decode_down(values: Values, grid: Grid) -> list[Loop]:
    """A program makes columns of A h by the first loop, or logits by the second."""
    low_rank = cdiv(values["NUM_EXPERTS"] * values["RANK"], values["BLOCK_N"]) / grid[0]
    turns = _features(values, "BLOCK_K") / values["SPLITS"]
    return [Loop(turns, low_rank), Loop(turns, 1 - low_rank)]


def _token_mean(values: Values, grid: Grid) -> list[Loop]:
    """Both means' partial sums."""
    asked = 2 * 4 * values["BLOCK_T"] * values["PADDED_EXPERTS"]
    return [Loop(cdiv(values["blocks"], values["BLOCK_T"]), bytes=asked)]


def _router_backward(values: Values, grid: Grid) -> list[Loop]:
    return [Loop(values["partials"], bytes=4 * values["BLOCK_T"] * values["PADDED_EXPERTS"])]


def _sum_parts(values: Values, grid: Grid) -> list[Loop]:
    """A program makes a block of one of the sums."""
    asked = 4 * values["BLOCK_T"] * values["BLOCK_D"]
    sums = ((values[f"parts_{index}"], values[f"programs_{index}"]) for index in range(MAX_SUMS))
    return [Loop(parts, programs / grid[0], asked) for parts, programs in sums if programs]


def _norm_projection(values: Values, grid: Grid) -> list[Loop]:
    """The rows' statistics, then the product."""
    asked = values["hidden_in"].itemsize * values["BLOCK_T"] * values["BLOCK_D"]
    return [Loop(_features(values), bytes=asked), Loop(_features(values))]


def _norm_backward(values: Values, grid: Grid) -> list[Loop]:
    """A row of G and x in, one of x's gradient out."""
    return [Loop(values["tokens"] / grid[0], bytes=3 * values["hidden_in"].itemsize * values["BLOCK_D"])]


# kernel -> (its launch's values, its grid) -> its loops in the order of the code
LOOPS: dict[str, Callable[[Values, Grid], list[Loop]]] = {
    "router_kernel": _router,
    "token_mean_kernel": _token_mean,
    "fusion_forward_kernel": _stream,
    "product_forward_kernel": _product_forward,
    "stream_grad_kernel": _stream,
    "row_grad_kernel": lambda values, grid: [Loop(_features(values) / grid[1])],
    "v_grad_kernel": lambda values, grid: [Loop(_features(values) / grid[1])],
    "b_grad_kernel": lambda values, grid: [Loop(_tokens(values) / grid[1])],
    "router_backward_kernel": _router_backward,
    "sum_parts_kernel": _sum_parts,
    "router_weight_grad_kernel": lambda values, grid: [Loop(_tokens(values) / grid[1])],
    "decode_down_kernel": _decode_down,
    "decode_fusion_kernel": lambda values, _: [
        Loop(_features(values, "BLOCK_K")),
        Loop(values["NUM_EXPERTS"], constant=True),
    ],
    "norm_projection_kernel": _norm_projection,
    "norm_backward_kernel": _norm_backward,
}


# kernel -> of how many alike branches of its code, each with a loop of its own, a program runs one
BRANCHES: dict[str, Callable[[Values], int]] = {
    "sum_parts_kernel": lambda values: sum(values[f"programs_{index}"] > 0 for index in range(MAX_SUMS)),
}


def turns(loops: Sequence[Loop], parts: Sequence[Entry], branches: int = 1) -> list[float]:
    """How often a program runs each part of a build, from the loops of its kernel's source.

    Of code outside loops, which no part tells apart by branches, it runs one branch's.

    Of an unrolled loop one turn is several, and those that are left may be a loop behind it; of one that is unrolled as
    a whole nothing is left. Of a loop that multiplies by tcgen05, triton's pipeline puts the last turn behind it.

    Raises:
        ValueError: the code has other loops.
    """
    found = [1 / branches]
    of_code = [part["counts"] for part in parts[1:]]
    if len(of_code) < len(loops):
        loops = [loop for loop in loops if not loop.constant]
    for index, loop in enumerate(loops):
        if not of_code:
            break
        counts = of_code.pop(0)
        at_once = max(round(counts.get("global", 0) / loop.bytes), 1) if loop.bytes else 1
        whole = loop.turns - ("UTCHMMA" in counts)
        if at_once > 1 and len(of_code) >= len(loops) - index:
            of_code.pop(0)
            found += [loop.share * (whole // at_once), loop.share * (whole % at_once)]
        else:
            found.append(loop.share * whole / at_once)
    if of_code or len(found) < 1 + len(loops):
        raise ValueError(f"its code has {len(parts) - 1} loops, its source {len(loops)}")
    return found
