r"""Forward fusion inside the shared product: S = h W_s^T + b_s lives in the accumulator of the program that uses it.

The same equation as `fusion_forward`. One program makes one [BLOCK_T, BLOCK_D] tile of S over all of d, then the output
of that tile in strips of BLOCK_STRIP columns, one after the other, so that Z_k takes registers for one strip alone. S
goes to memory only where the backward keeps it.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hycam_kernels.backends.triton.kernels.cost import Cost
from hycam_kernels.backends.triton.kernels.fusion_forward import fusion_forward_cost, fusion_forward_reference
from hycam_kernels.backends.triton.kernels.primitives import (
    add_experts,
    row_product,
    silu,
    silu_gate,
    silu_unit,
    store_modulated,
)
from hycam_kernels.backends.triton.launch import COMPUTE_NAMES, Launcher, dense_rows, row_stride
from hycam_kernels.inputs import ModulationInputs


@triton.jit
def product_forward_kernel(
    hidden, shared_weight, shared_bias, v, lora_b, lora_b_bias, weights, attn_output, residual, out, s,
    tokens, d, stride_hidden, stride_shared, stride_v, stride_attn, stride_residual, scale,
    NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr, SIGMOID: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_STRIP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # GROUP blocks of tokens go through all columns together: what they read of h and W_s stays in L2
    row_blocks = tl.cdiv(tokens, BLOCK_T)
    group_programs = GROUP * tl.cdiv(d, BLOCK_D)
    first = tl.program_id(0) // group_programs * GROUP
    group_rows = tl.minimum(row_blocks - first, GROUP)
    within = tl.program_id(0) % group_programs
    rows = (first + within % group_rows) * BLOCK_T + tl.arange(0, BLOCK_T)
    start = within // group_rows * BLOCK_D
    cols = start + tl.arange(0, BLOCK_D)
    row_mask = rows < tokens
    col_mask = cols < d

    product = row_product(
        hidden, shared_weight, rows, row_mask, cols, col_mask, 0, d, stride_hidden, stride_shared,
        COMPUTE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_K, "",
    )  # fmt: skip
    tiles = strips(product, BLOCK_T, BLOCK_D, BLOCK_STRIP)
    for index in tl.static_range(BLOCK_D // BLOCK_STRIP):
        s_tile = tiles[index]
        cols = start + index * BLOCK_STRIP + tl.arange(0, BLOCK_STRIP)
        col_mask = cols < d
        if shared_bias is not None:
            s_tile += tl.load(shared_bias + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        if s is not None:
            tl.store(
                s + rows.to(tl.int64)[:, None] * d + cols[None, :],
                s_tile.to(s.dtype.element_ty),
                mask=row_mask[:, None] & col_mask[None, :],
            )
        a = s_tile * silu_unit(SIGMOID)
        fusion = add_experts(
            silu(a, silu_gate(a, SIGMOID), SIGMOID),
            v, lora_b, lora_b_bias, weights, rows, cols, row_mask, col_mask, d, stride_v, scale,
            NUM_EXPERTS, RANK, SIGMOID, PRECISION, BLOCK_T, BLOCK_STRIP, BLOCK_R,
        )  # fmt: skip
        store_modulated(
            fusion, attn_output, residual, out, rows, cols, row_mask, col_mask, d, stride_attn, stride_residual
        )  # fmt: skip


@triton.jit
def strips(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """The tile cut into tiles of WIDTH columns, from left to right."""
    if COLUMNS == WIDTH:
        return (tile,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        return strips(left, ROWS, COLUMNS // 2, WIDTH) + strips(right, ROWS, COLUMNS // 2, WIDTH)


def product_forward(
    launch: Launcher, x: ModulationInputs, hidden: Tensor, v: Tensor | None, lora_b: Tensor | None, weights: Tensor
) -> tuple[Tensor, Tensor | None]:
    """h_out [T, d] in attn_output's dtype and, where ``x.keep``, S [T, d].

    ``hidden`` is in the compute dtype; V [T, E r], contiguous B [E, d, r] and the used p [T, E] as in `fusion_forward`.
    """
    assert x.shared_weight is not None
    shared_weight = dense_rows(x.shared_weight.to(x.compute_dtype))
    tokens, d = x.hidden.shape
    out = torch.empty(tokens, d, dtype=x.attn_output.dtype, device=x.hidden.device)
    s = torch.empty(tokens, d, dtype=x.compute_dtype, device=x.hidden.device) if x.keep else None
    config = launch.config("product_forward", x)
    launch(
        product_forward_kernel,
        (triton.cdiv(tokens, config["BLOCK_T"]) * triton.cdiv(d, config["BLOCK_D"]),),
        config,
        hidden=hidden,
        shared_weight=shared_weight,
        shared_bias=x.shared_bias,
        out=out,
        s=s,
        stride_hidden=row_stride(hidden),
        stride_shared=row_stride(shared_weight),
        COMPUTE=COMPUTE_NAMES[x.compute_dtype],
        **launch.fusion_arguments(x, v, lora_b, weights),
    )
    return out, s


def product_forward_reference(hidden: Tensor, shared_weight: Tensor, shared_bias: Tensor | None, **others) -> Tensor:
    """`fusion_forward_reference` with S = h W_s^T + b_s."""
    return fusion_forward_reference(F.linear(hidden, shared_weight, shared_bias), **others)


def product_forward_cost(
    tokens: int, d: int, num_experts: int, rank: int, *, residual=False, kept=False, itemsize=2
) -> Cost:
    """Reads h, W_s, h_att (h_in), V, B and p; writes h_out (S); the products of T d d and T d E r."""
    after = fusion_forward_cost(tokens, d, num_experts, rank, residual=residual, itemsize=itemsize)
    return Cost(
        after.bytes + itemsize * (d * d + kept * tokens * d),
        after.flops + 2 * tokens * d * d,
        after.sigmoids,
    )
