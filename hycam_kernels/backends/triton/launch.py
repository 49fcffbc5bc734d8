"""Kernel launches: the configuration of a call from the table of its GPU family, and compile-time constants."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from hycam_kernels.backends.triton.config_tables import Config, launch_parameters, load_table, select
from hycam_kernels.inputs import ModulationInputs, NormProjectInputs

# what a row says of the splits of a dimension, through each of which a program goes
SPLIT_BY = {"SPLITS", "PROGRAMS"}
# what a program does beside its loop, in turns of it
TURNS_TO_START = 2
# of every build: triton 3.10 takes products and sums apart unless it is asked not to
COMPILER_OPTIONS = {"enable_fp_fusion": True}
# tl.dot needs at least 16 along every dimension
MIN_DOT = 16
COMPUTE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def padded_experts(num_experts: int) -> int:
    """Lanes that hold one token's routing: a power of 2 that `tl.dot` takes as a tile's width."""
    return max(MIN_DOT, triton.next_power_of_2(num_experts))


def row_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def dense_rows(matrix: Tensor | None) -> Tensor | None:
    """The matrix, or a copy of it, with a last stride of 1."""
    return matrix if matrix is None or matrix.stride(-1) == 1 else matrix.contiguous()


def split_length(length: int, splits: int, block: int) -> tuple[int, int]:
    """Length of a split in whole blocks, and the number of splits that are not empty; 1 of them at least."""
    per_split = max(triton.cdiv(triton.cdiv(length, splits), block), 1) * block
    return per_split, max(triton.cdiv(length, per_split), 1)


def split(config: Config, groups: int, length: int, block: int) -> tuple[int, int]:
    """`split_length` for each of ``groups``, by the row's SPLITS or PROGRAMS, which leave it; else every block is one.

    PROGRAMS are what the GPU runs at once: the splits are those with which the last of them ends first.
    """
    turns = max(triton.cdiv(length, block), 1)
    if "PROGRAMS" in config:
        at_once = config.pop("PROGRAMS")

        def last_end(splits: int) -> int:
            return triton.cdiv(groups * splits, at_once) * (triton.cdiv(turns, splits) + TURNS_TO_START)

        return split_length(length, min(range(1, min(turns, at_once) + 1), key=last_end), block)
    return split_length(length, config.pop("SPLITS", turns), block)


def add_parts(partial: Tensor) -> Tensor:
    """The sum of the splits' parts, in their order."""
    return partial[0] if partial.shape[0] == 1 else partial.sum(0)


class Launcher:
    """Launches kernels with the configurations of one GPU family.

    Args:
        family: name of a table in `hycam_kernels.configs`, as in `tables.family_of`.
        inline_assembly: whether kernels may use the PTX of NVIDIA GPUs (the interpreter runs none).
    """

    def __init__(self, family: str, *, inline_assembly: bool) -> None:
        self.family = family
        self.table = load_table(family)
        self.inline_assembly = inline_assembly
        self.has_tf32 = family.startswith("sm_")

    def config(self, kernel: str, x: ModulationInputs | NormProjectInputs) -> Config:
        """Block sizes, warps and stages for the call, BLOCK_R cut to the rank."""
        index = self.row(kernel, x)
        if index is None:
            raise LookupError(f"{kernel}: no configuration for {tuple(x.shape)}, {x.num_experts} x {x.rank}")
        config = launch_parameters(self.table[kernel][index])
        if "BLOCK_R" in config:
            config["BLOCK_R"] = min(config["BLOCK_R"], max(MIN_DOT, triton.next_power_of_2(x.rank)))
        return config

    def takes(self, kernel: str, x: ModulationInputs) -> bool:
        """Whether the family has a configuration of an optional kernel for the call."""
        return self.row(kernel, x) is not None

    def row(self, kernel: str, x: ModulationInputs | NormProjectInputs) -> int | None:
        """Index of the table's row for the call; None where no row takes it."""
        tokens, d = x.shape
        kept = isinstance(x, ModulationInputs) and x.keep
        plain = isinstance(x, NormProjectInputs) or (x.lora_b_bias is None and x.residual is None)
        return select(self.table, kernel, x.compute_dtype, tokens, d, x.num_experts, x.rank, kept=kept, plain=plain)

    def arithmetic(self, x: ModulationInputs | NormProjectInputs) -> dict[str, Any]:
        """Compile-time constants of the arithmetic: how SiLU is made, and the precision of float32 products.

        tanh.approx is as good as bfloat16 is, and takes half the special functions.
        """
        as_tanh = x.compute_dtype == torch.bfloat16
        approximate = {True: "tanh.approx", False: "rcp.approx"}
        exact = {True: "tanh", False: "division"}
        reduced = x.compute_dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        return {
            "SIGMOID": (approximate if self.inline_assembly else exact)[as_tanh],
            "PRECISION": "tf32" if reduced and self.has_tf32 else "ieee",
        }

    def fusion_arguments(
        self, x: ModulationInputs, v: Tensor | None, lora_b: Tensor | None, weights: Tensor
    ) -> dict[str, Any]:
        """What all fusion kernels take; V [T, E r], contiguous B [E, d, r] and the used p [T, E]."""
        tokens, d = x.shape
        return {
            "v": v,
            "lora_b": lora_b,
            "lora_b_bias": x.lora_b_bias,
            "weights": weights,
            "attn_output": x.attn_output,
            "residual": x.residual,
            "tokens": tokens,
            "d": d,
            "stride_v": row_stride(v),
            "stride_attn": row_stride(x.attn_output),
            "stride_residual": row_stride(x.residual),
            "scale": x.scale,
            "NUM_EXPERTS": x.num_experts,
            "RANK": x.rank,
            **self.arithmetic(x),
        }

    def __call__(self, kernel, grid: tuple[int, ...], config: Mapping[str, int], **arguments) -> None:
        kernel[grid](**arguments, **config, **COMPILER_OPTIONS)
