"""Sums over splits: parts that several programs made, in float32, added in their order and rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hycam_kernels.backends.triton.kernels.cost import Cost
from hycam_kernels.backends.triton.launch import Launcher
from hycam_kernels.inputs import ModulationInputs, NormProjectInputs


@triton.jit
def sum_parts_kernel(
    partial, total,
    parts, rows, columns, stride_total,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)[:, None]
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    mask = (row < rows) & (column < columns)
    part = partial + row * columns + column
    result = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for _ in range(parts):
        result += tl.load(part, mask=mask, other=0.0)
        part += tl.cast(rows, tl.int64) * columns
    tl.store(total + row * stride_total + column, result.to(total.dtype.element_ty), mask=mask)


def sum_parts(launch: Launcher, x: ModulationInputs | NormProjectInputs, partial: Tensor, total: Tensor) -> None:
    """Fill ``total`` [rows, columns], whose rows are dense, with the sum of ``partial`` [parts, rows, columns]."""
    config = launch.config("sum_parts", x)
    if total.is_contiguous() and total.numel() % config["BLOCK_D"] == 0:
        # whole blocks, however few rows there are
        partial, total = partial.view(partial.shape[0], -1, config["BLOCK_D"]), total.view(-1, config["BLOCK_D"])
    parts, rows, columns = partial.shape
    launch(
        sum_parts_kernel,
        (triton.cdiv(rows, config["BLOCK_T"]), triton.cdiv(columns, config["BLOCK_D"])),
        config,
        partial=partial,
        total=total,
        parts=parts,
        rows=rows,
        columns=columns,
        stride_total=total.stride(0),
    )


def sum_parts_reference(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum in partial's dtype, rounded once."""
    return partial.sum(0).to(dtype)


def sum_parts_cost(parts: int, rows: int, columns: int, *, itemsize=2) -> Cost:
    """Reads the parts, writes their sum."""
    return Cost((4 * parts + itemsize) * rows * columns, 0)
