r"""Forward fusion inside the shared product: S = h W_s^T + b_s lives in the accumulator of the program that uses it.

The same equation as `fusion_forward`. One program makes one [BLOCK_T, BLOCK_D] tile of S over all of d, then the output
of that tile in PARTS strips of columns, one after the other, so that Z_k takes registers for one strip alone. S goes to
memory only where the backward keeps it.
"""
# ruff: noqa: N803 (compile-time constants are in capitals)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import ModulationInputs
from .cost import Cost
from .launch import Launcher, row_stride
from .primitives import add_experts, sigmoid, store_modulated


@triton.jit
def product_forward_kernel(
    hidden, shared_weight, shared_bias, v, lora_b, lora_b_bias, weights, attn_output, residual, out, s,
    tokens, d, stride_hidden, stride_shared, stride_v, stride_attn, stride_residual, scale,
    NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr, FAST_RECIPROCAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr,
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

    product = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    hidden_rows = hidden + rows.to(tl.int64)[:, None] * stride_hidden
    weight_rows = shared_weight + cols.to(tl.int64)[:, None] * stride_shared
    for at in range(0, d, BLOCK_K):
        features = at + tl.arange(0, BLOCK_K)
        inside = (features < d)[None, :]
        h = tl.load(hidden_rows + features[None, :], mask=row_mask[:, None] & inside, other=0.0)
        w = tl.load(weight_rows + features[None, :], mask=col_mask[:, None] & inside, other=0.0)
        product = tl.dot(h, tl.trans(w), product, input_precision=PRECISION)

    WIDTH: tl.constexpr = BLOCK_D // PARTS
    strips = (product,)
    if PARTS == 2:
        strips = halves(product, BLOCK_T, BLOCK_D)
    elif PARTS == 4:
        left, right = halves(product, BLOCK_T, BLOCK_D)
        strips = halves(left, BLOCK_T, BLOCK_D // 2) + halves(right, BLOCK_T, BLOCK_D // 2)
    for part in tl.static_range(PARTS):
        s_tile = strips[part]
        cols = start + part * WIDTH + tl.arange(0, WIDTH)
        col_mask = cols < d
        if shared_bias is not None:
            s_tile += tl.load(shared_bias + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        if s is not None:
            tl.store(
                s + rows.to(tl.int64)[:, None] * d + cols[None, :],
                s_tile.to(s.dtype.element_ty),
                mask=row_mask[:, None] & col_mask[None, :],
            )
        fusion = add_experts(
            s_tile * sigmoid(s_tile, FAST_RECIPROCAL),
            v, lora_b, lora_b_bias, weights, rows, cols, row_mask, col_mask, d, stride_v, scale,
            NUM_EXPERTS, RANK, FAST_RECIPROCAL, PRECISION, BLOCK_T, WIDTH, BLOCK_R,
        )  # fmt: skip
        store_modulated(
            fusion, attn_output, residual, out, rows, cols, row_mask, col_mask, d, stride_attn, stride_residual
        )  # fmt: skip


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


def product_forward(
    launch: Launcher,
    x: ModulationInputs,
    hidden: Tensor,
    shared_weight: Tensor,
    shared_bias: Tensor | None,
    v: Tensor | None,
    lora_b: Tensor | None,
    weights: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """h_out [T, d] in attn_output's dtype and, where ``x.keep``, S [T, d].

    h and the weights are in the compute dtype; V [T, E r], contiguous B [E, d, r] and the used p [T, E] as in
    `fusion_forward`.
    """
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
        shared_bias=shared_bias,
        v=v,
        lora_b=lora_b,
        lora_b_bias=x.lora_b_bias,
        weights=weights,
        attn_output=x.attn_output,
        residual=x.residual,
        out=out,
        s=s,
        tokens=tokens,
        d=d,
        stride_hidden=row_stride(hidden),
        stride_shared=row_stride(shared_weight),
        stride_v=row_stride(v),
        stride_attn=row_stride(x.attn_output),
        stride_residual=row_stride(x.residual),
        scale=x.scale,
        NUM_EXPERTS=x.num_experts,
        RANK=x.rank,
        **launch.arithmetic(x),
    )
    return out, s
