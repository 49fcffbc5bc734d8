"""Sums over splits: parts that several programs made, in float32, added in their order and rounded once."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hycam_kernels.backends.triton.config_tables import Config
from hycam_kernels.backends.triton.kernels.cost import Cost
from hycam_kernels.backends.triton.launch import Launcher
from hycam_kernels.inputs import ModulationInputs, NormProjectInputs

# of one launch
MAX_SUMS = 3


@triton.jit
def sum_block(
    program, partial, total, parts, rows, columns, stride_total, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    blocks = tl.cdiv(columns, BLOCK_D)
    # the rows before the block in one wide number, those of the block in narrow ones: fewer registers
    first = (program // blocks).to(tl.int64) * BLOCK_T
    row = tl.arange(0, BLOCK_T)[:, None]
    column = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    mask = (row < rows - first) & (column < columns)
    part = partial + first * columns
    result = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for _ in range(parts):
        result += tl.load(part + row * columns + column, mask=mask, other=0.0)
        part += tl.cast(rows, tl.int64) * columns
    total += first * stride_total
    tl.store(total + row * stride_total + column, result.to(total.dtype.element_ty), mask=mask)


@triton.jit
def sum_parts_kernel(
    partial_0, total_0, parts_0, rows_0, columns_0, stride_0, programs_0,
    partial_1, total_1, parts_1, rows_1, columns_1, stride_1, programs_1,
    partial_2, total_2, parts_2, rows_2, columns_2, stride_2, programs_2,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program makes a block of one of the sums; each is its own branch, so that its strides stay known multiples."""
    program = tl.program_id(0)
    if program < programs_0:
        sum_block(program, partial_0, total_0, parts_0, rows_0, columns_0, stride_0, BLOCK_T, BLOCK_D)
    if partial_1 is not None:
        program -= programs_0
        if (program >= 0) & (program < programs_1):
            sum_block(program, partial_1, total_1, parts_1, rows_1, columns_1, stride_1, BLOCK_T, BLOCK_D)
    if partial_2 is not None:
        program -= programs_1
        if program >= 0:
            sum_block(program, partial_2, total_2, parts_2, rows_2, columns_2, stride_2, BLOCK_T, BLOCK_D)


def sum_parts(launch: Launcher, x: ModulationInputs | NormProjectInputs, sums: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Fill totals with the sums of their parts, by one launch.

    Args:
        sums: at most `MAX_SUMS` of (parts [parts, ..., columns] in float32, total [..., columns] with dense rows).
    """
    if not sums:
        return
    config = launch.config("sum_parts", x)
    arguments: dict[str, Any] = {}
    programs = 0
    for index in range(MAX_SUMS):
        of_sum = _arguments(config, *sums[index]) if index < len(sums) else _ABSENT
        arguments |= {f"{name}_{index}": value for name, value in of_sum.items()}
        programs += of_sum["programs"]
    launch(sum_parts_kernel, (programs,), config, **arguments)


_ABSENT: dict[str, Any] = {
    "partial": None,
    "total": None,
    "parts": 0,
    "rows": 0,
    "columns": 0,
    "stride": 0,
    "programs": 0,
}


def _arguments(config: Config, partial: Tensor, total: Tensor) -> dict[str, Any]:
    columns = total.shape[-1]
    if total.is_contiguous() and total.numel() % config["BLOCK_D"] == 0:
        # whole blocks, however few rows there are
        columns = config["BLOCK_D"]
    partial, total = partial.reshape(partial.shape[0], -1, columns), total.view(-1, columns)
    rows = total.shape[0]
    return {
        "partial": partial,
        "total": total,
        "parts": partial.shape[0],
        "rows": rows,
        "columns": columns,
        "stride": total.stride(0),
        "programs": triton.cdiv(rows, config["BLOCK_T"]) * triton.cdiv(columns, config["BLOCK_D"]),
    }


def sum_parts_reference(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum in partial's dtype, rounded once."""
    return partial.sum(0).to(dtype)


def sum_parts_cost(*sums: tuple[int, int, int]) -> Cost:
    """Reads the parts of each (parts, elements of their sum, bytes of such an element), writes the sums."""
    return Cost(sum((4 * parts + itemsize) * elements for parts, elements, itemsize in sums), 0)
