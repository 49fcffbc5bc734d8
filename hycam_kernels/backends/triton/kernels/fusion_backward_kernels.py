"""The kernels of `fusion_backward`; equations and launchers are there.

p_k and the scale are constant along a row of D_k: they are multiplied into the sum over d of its product, or into V_k.
"""
# mypy: disable-error-code=assignment

import triton
import triton.language as tl

from hycam_kernels.backends.triton.kernels.primitives import (
    expert_tile,
    load_all_v,
    load_all_weights,
    load_b,
    load_expert_bias,
    load_stream,
    load_tile,
    load_v,
    load_weight,
    of_expert,
    resident_tile,
    silu,
    silu_gate,
    silu_gradient,
    silu_unit,
)


@triton.jit
def stream_grad_kernel(
    grad_out, s, v, lora_b, lora_b_bias, weights, attn_output, residual, d_attn, d_residual, d_s, partial_d_probs,
    tokens, d, columns, stride_grad, stride_s, stride_v, stride_attn, stride_residual, scale,
    NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr, SIGMOID: tl.constexpr, PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A token block over ``columns`` features, which are one block unless V is RESIDENT."""
    splits = tl.cdiv(d, columns)
    split = tl.program_id(0) % splits
    rows = tl.program_id(0) // splits * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = rows < tokens
    unit = silu_unit(SIGMOID)
    partial = partial_d_probs
    if NUM_EXPERTS > 0:
        partial += (split.to(tl.int64) * tokens + rows) * NUM_EXPERTS
    if RESIDENT:
        v_tiles = load_all_v(v, rows, row_mask, stride_v, NUM_EXPERTS, RANK, BLOCK_R)
        p = load_all_weights(weights, rows, row_mask, NUM_EXPERTS)
        d_p = ()
        for _ in tl.static_range(NUM_EXPERTS):
            d_p = d_p + (tl.zeros((BLOCK_T,), tl.float32),)
        for start in range(split * columns, tl.minimum(split * columns + columns, d), BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            col_mask = cols < d
            grad, d_fusion, fusion = start_of_stream_grad(
                grad_out, s, attn_output, residual, d_s, rows, cols, row_mask, col_mask, d,
                stride_grad, stride_s, stride_attn, stride_residual, SIGMOID, BLOCK_T, BLOCK_D,
            )  # fmt: skip
            next_d_p = ()
            for expert in tl.static_range(NUM_EXPERTS):
                b_tile = load_b(lora_b, expert, cols, col_mask, 0, d, RANK, BLOCK_R)
                a = resident_tile(
                    v_tiles[expert], b_tile, lora_b_bias, expert, start, col_mask, d, scale * unit, BLOCK_D, PRECISION
                )
                activation = silu(a, silu_gate(a, SIGMOID), SIGMOID)
                fusion += p[expert][:, None] * activation
                next_d_p = next_d_p + (d_p[expert] + tl.sum(d_fusion * activation, 1),)
            d_p = next_d_p
            store_stream_grad(grad, fusion, d_attn, d_residual, rows, cols, row_mask, col_mask, d)
        for expert in tl.static_range(NUM_EXPERTS):
            tl.store(partial + expert, d_p[expert] / unit, mask=row_mask)
    else:
        cols = split * columns + tl.arange(0, BLOCK_D)
        col_mask = cols < d
        grad, d_fusion, fusion = start_of_stream_grad(
            grad_out, s, attn_output, residual, d_s, rows, cols, row_mask, col_mask, d,
            stride_grad, stride_s, stride_attn, stride_residual, SIGMOID, BLOCK_T, BLOCK_D,
        )  # fmt: skip
        if NUM_EXPERTS > 0:
            for expert in tl.range(0, NUM_EXPERTS, loop_unroll_factor=1):
                a = expert_tile(
                    v, lora_b, lora_b_bias, expert, rows, cols, row_mask, col_mask, d, stride_v, scale * unit,
                    RANK, BLOCK_T, BLOCK_D, BLOCK_R, PRECISION,
                )  # fmt: skip
                activation = silu(a, silu_gate(a, SIGMOID), SIGMOID)
                tl.store(partial + expert, tl.sum(d_fusion * activation, 1) / unit, mask=row_mask)
                weight = load_weight(weights, expert, rows, row_mask, NUM_EXPERTS)
                fusion += weight[:, None] * activation
        # read again: held through the loop it would cost a tile of registers
        mask = row_mask[:, None] & col_mask[None, :]
        grad = load_tile(grad_out, rows[:, None], cols[None, :], stride_grad, mask)
        store_stream_grad(grad, fusion, d_attn, d_residual, rows, cols, row_mask, col_mask, d)


@triton.jit
def start_of_stream_grad(
    grad_out, s, attn_output, residual, d_s, rows, cols, row_mask, col_mask, d,
    stride_grad, stride_s, stride_attn, stride_residual,
    SIGMOID: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """G, F `silu_unit`, and SiLU(S), whose gradient is stored."""
    mask = row_mask[:, None] & col_mask[None, :]
    grad = load_tile(grad_out, rows[:, None], cols[None, :], stride_grad, mask)
    stream = load_stream(attn_output, residual, rows[:, None], cols[None, :], stride_attn, stride_residual, mask)
    d_fusion = grad * stream * silu_unit(SIGMOID)
    fusion = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    if s is not None:
        a = load_tile(s, rows[:, None], cols[None, :], stride_s, mask) * silu_unit(SIGMOID)
        gate = silu_gate(a, SIGMOID)
        fusion = silu(a, gate, SIGMOID)
        d_s_tile = silu_gradient(d_fusion, a, gate, SIGMOID).to(d_s.dtype.element_ty)
        tl.store(d_s + rows.to(tl.int64)[:, None] * d + cols[None, :], d_s_tile, mask=mask)
    return grad, d_fusion, fusion


@triton.jit
def store_stream_grad(grad, fusion, d_attn, d_residual, rows, cols, row_mask, col_mask, d):
    mask = row_mask[:, None] & col_mask[None, :]
    contiguous = rows.to(tl.int64)[:, None] * d + cols[None, :]
    through_stream = grad * fusion
    if d_residual is not None:
        tl.store(d_residual + contiguous, through_stream.to(d_residual.dtype.element_ty), mask=mask)
    if d_attn is not None:
        tl.store(d_attn + contiguous, (grad + through_stream).to(d_attn.dtype.element_ty), mask=mask)


@triton.jit
def v_grad_kernel(
    grad_out, v, lora_b, lora_b_bias, weights, attn_output, residual, partial_d_v,
    tokens, d, columns, stride_grad, stride_v, stride_attn, stride_residual, scale,
    NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr, SIGMOID: tl.constexpr, PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """EXPERTS of one (rank block, token block) over ``columns`` features from split program_id(1) on.

    They share what they read of G and the stream. More than one of them needs a rank that fits one block.
    """
    rank_blocks: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    groups: tl.constexpr = (NUM_EXPERTS + EXPERTS - 1) // EXPERTS
    first = tl.program_id(0) % groups * EXPERTS
    rank_start = tl.program_id(0) // groups % rank_blocks * BLOCK_R
    rows = tl.program_id(0) // (groups * rank_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    row_mask = rows < tokens
    v_tiles = ()
    d_v = ()
    for index in tl.static_range(EXPERTS):
        if rank_blocks == 1:
            there = of_expert(row_mask, first + index, NUM_EXPERTS)
            v_tiles = v_tiles + (load_v(v, first + index, rows, there, 0, stride_v, RANK, BLOCK_R),)
        d_v = d_v + (tl.zeros((BLOCK_T, BLOCK_R), tl.float32),)

    end = tl.minimum((split + 1) * columns, d)
    for start in range(split * columns, end, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        col_mask = cols < end
        mask = row_mask[:, None] & col_mask[None, :]
        grad = load_tile(grad_out, rows[:, None], cols[None, :], stride_grad, mask)
        stream = load_stream(attn_output, residual, rows[:, None], cols[None, :], stride_attn, stride_residual, mask)
        d_fusion = grad * stream * silu_unit(SIGMOID)
        next_d_v = ()
        for index in tl.static_range(EXPERTS):
            expert = first + index
            valid = of_expert(col_mask, expert, NUM_EXPERTS)
            b_tile = load_b(lora_b, expert, cols, valid, rank_start, d, RANK, BLOCK_R)
            if rank_blocks == 1:
                a = resident_tile(
                    v_tiles[index], b_tile, lora_b_bias, expert, start, valid, d, scale * silu_unit(SIGMOID),
                    BLOCK_D, PRECISION,
                )  # fmt: skip
            else:
                a = expert_tile(
                    v, lora_b, lora_b_bias, expert, rows, cols, row_mask, col_mask, d, stride_v,
                    scale * silu_unit(SIGMOID), RANK, BLOCK_T, BLOCK_D, BLOCK_R, PRECISION,
                )  # fmt: skip
            d_z = silu_gradient(d_fusion, a, silu_gate(a, SIGMOID), SIGMOID)
            next_d_v = next_d_v + (tl.dot(d_z.to(b_tile.dtype), b_tile, d_v[index], input_precision=PRECISION),)
        d_v = next_d_v

    ranks = rank_start + tl.arange(0, BLOCK_R)
    partial_rows = (split.to(tl.int64) * tokens + rows)[:, None] * (NUM_EXPERTS * RANK)
    for index in tl.static_range(EXPERTS):
        expert = first + index
        there = of_expert(row_mask, expert, NUM_EXPERTS)
        weight = load_weight(weights, expert, rows, there, NUM_EXPERTS) * scale
        offsets = partial_rows + expert * RANK + ranks[None, :]
        tl.store(partial_d_v + offsets, d_v[index] * weight[:, None], mask=there[:, None] & (ranks < RANK)[None, :])


@triton.jit
def row_grad_kernel(
    grad_out, s, v, lora_b, lora_b_bias, weights, attn_output, residual,
    d_attn, d_residual, d_s, partial_d_probs, partial_d_v,
    tokens, d, columns, stride_grad, stride_s, stride_v, stride_attn, stride_residual, scale,
    NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr, SIGMOID: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`stream_grad_kernel` and `v_grad_kernel` in one: a token block over the features of split program_id(1).

    Every expert's sums stay in registers, so its loop is unrolled, and r must fit one block.
    """
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    row_mask = rows < tokens
    d_v = ()
    d_p = ()
    for _ in tl.static_range(NUM_EXPERTS):
        d_v = d_v + (tl.zeros((BLOCK_T, BLOCK_R), tl.float32),)
        d_p = d_p + (tl.zeros((BLOCK_T,), tl.float32),)

    end = tl.minimum((split + 1) * columns, d)
    for start in range(split * columns, end, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        col_mask = cols < end
        grad, d_fusion, fusion = start_of_stream_grad(
            grad_out, s, attn_output, residual, d_s, rows, cols, row_mask, col_mask, d,
            stride_grad, stride_s, stride_attn, stride_residual, SIGMOID, BLOCK_T, BLOCK_D,
        )  # fmt: skip
        next_d_v = ()
        next_d_p = ()
        for expert in tl.static_range(NUM_EXPERTS):
            v_tile = load_v(v, expert, rows, row_mask, 0, stride_v, RANK, BLOCK_R)
            b_tile = load_b(lora_b, expert, cols, col_mask, 0, d, RANK, BLOCK_R)
            a = resident_tile(
                v_tile, b_tile, lora_b_bias, expert, start, col_mask, d, scale * silu_unit(SIGMOID), BLOCK_D, PRECISION
            )
            gate = silu_gate(a, SIGMOID)
            activation = silu(a, gate, SIGMOID)
            # read each turn: every expert's would cost registers, which some compilers spill
            weight = load_weight(weights, expert, rows, row_mask, NUM_EXPERTS)
            fusion += weight[:, None] * activation
            next_d_p = next_d_p + (d_p[expert] + tl.sum(d_fusion * activation, 1),)
            d_z = silu_gradient(d_fusion, a, gate, SIGMOID)
            next_d_v = next_d_v + (tl.dot(d_z.to(b_tile.dtype), b_tile, d_v[expert], input_precision=PRECISION),)
        d_v = next_d_v
        d_p = next_d_p
        # read again: held through the experts it would cost a tile of registers
        mask = row_mask[:, None] & col_mask[None, :]
        grad = load_tile(grad_out, rows[:, None], cols[None, :], stride_grad, mask)
        store_stream_grad(grad, fusion, d_attn, d_residual, rows, cols, row_mask, col_mask, d)

    ranks = tl.arange(0, BLOCK_R)
    partial_rows = split.to(tl.int64) * tokens + rows
    for expert in tl.static_range(NUM_EXPERTS):
        d_prob = d_p[expert] / silu_unit(SIGMOID)
        tl.store(partial_d_probs + partial_rows * NUM_EXPERTS + expert, d_prob, mask=row_mask)
        offsets = partial_rows[:, None] * (NUM_EXPERTS * RANK) + expert * RANK + ranks[None, :]
        weight = load_weight(weights, expert, rows, row_mask, NUM_EXPERTS)
        d_v_tile = d_v[expert] * (weight * scale)[:, None]
        tl.store(partial_d_v + offsets, d_v_tile, mask=row_mask[:, None] & (ranks < RANK)[None, :])


@triton.jit
def b_grad_kernel(
    grad_out, v, lora_b, lora_b_bias, weights, attn_output, residual, partial_d_b, partial_d_bias,
    tokens, d, tokens_per_split, stride_grad, stride_v, stride_attn, stride_residual, scale,
    NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr, SIGMOID: tl.constexpr, PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """EXPERTS of one (rank block, feature block) over the tokens of split program_id(1), as in `v_grad_kernel`.

    Tiles are transposed, [BLOCK_D, BLOCK_T]: Z^T = B V^T, so that dZ^T is the second product's left operand as it lies.
    """
    rank_blocks: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    groups: tl.constexpr = (NUM_EXPERTS + EXPERTS - 1) // EXPERTS
    first = tl.program_id(0) % groups * EXPERTS
    rank_start = tl.program_id(0) // groups % rank_blocks * BLOCK_R
    cols = tl.program_id(0) // (groups * rank_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    col_mask = cols < d
    b_tiles = ()
    d_b = ()
    d_bias = ()
    for index in tl.static_range(EXPERTS):
        if rank_blocks == 1:
            there = of_expert(col_mask, first + index, NUM_EXPERTS)
            b_tiles = b_tiles + (load_b(lora_b, first + index, cols, there, 0, d, RANK, BLOCK_R),)
        d_b = d_b + (tl.zeros((BLOCK_D, BLOCK_R), tl.float32),)
        d_bias = d_bias + (tl.zeros((BLOCK_D,), tl.float32),)

    end = tl.minimum((split + 1) * tokens_per_split, tokens)
    for start in range(split * tokens_per_split, end, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        row_mask = rows < end
        mask = col_mask[:, None] & row_mask[None, :]
        grad = load_tile(grad_out, rows[None, :], cols[:, None], stride_grad, mask)
        stream = load_stream(attn_output, residual, rows[None, :], cols[:, None], stride_attn, stride_residual, mask)
        d_fusion = grad * stream * silu_unit(SIGMOID)
        next_d_b = ()
        next_d_bias = ()
        for index in tl.static_range(EXPERTS):
            expert = first + index
            valid = of_expert(row_mask, expert, NUM_EXPERTS)
            v_tile = load_v(v, expert, rows, valid, rank_start, stride_v, RANK, BLOCK_R)
            if rank_blocks == 1:
                z = tl.dot(b_tiles[index], tl.trans(v_tile), input_precision=PRECISION)
            else:
                z = tl.zeros((BLOCK_D, BLOCK_T), tl.float32)
                for part in tl.range(0, RANK, BLOCK_R, loop_unroll_factor=1):
                    b_part = load_b(lora_b, expert, cols, col_mask, part, d, RANK, BLOCK_R)
                    v_part = load_v(v, expert, rows, row_mask, part, stride_v, RANK, BLOCK_R)
                    z = tl.dot(b_part, tl.trans(v_part), z, input_precision=PRECISION)
            if lora_b_bias is not None:
                z += load_expert_bias(lora_b_bias, expert, cols, of_expert(col_mask, expert, NUM_EXPERTS), d)[:, None]
            a = z * (scale * silu_unit(SIGMOID))
            d_z = silu_gradient(d_fusion, a, silu_gate(a, SIGMOID), SIGMOID)
            weight = load_weight(weights, expert, rows, valid, NUM_EXPERTS)
            if partial_d_bias is not None:
                next_d_bias = next_d_bias + (d_bias[index] + tl.sum(d_z * weight[None, :], 1),)
            # p_k for a row of V_k takes fewer loads than for a column of D_k^T
            weighted = (v_tile.to(tl.float32) * weight[:, None]).to(v_tile.dtype)
            next_d_b = next_d_b + (tl.dot(d_z.to(v_tile.dtype), weighted, d_b[index], input_precision=PRECISION),)
        d_b = next_d_b
        if partial_d_bias is not None:
            d_bias = next_d_bias

    ranks = rank_start + tl.arange(0, BLOCK_R)
    for index in tl.static_range(EXPERTS):
        expert = first + index
        there = of_expert(col_mask, expert, NUM_EXPERTS)
        features = (split.to(tl.int64) * NUM_EXPERTS + expert) * d + cols
        mask = there[:, None] & (ranks < RANK)[None, :]
        tl.store(partial_d_b + features[:, None] * RANK + ranks[None, :], d_b[index] * scale, mask=mask)
        if partial_d_bias is not None:
            tl.store(partial_d_bias + features, d_bias[index] * scale, mask=there & (rank_start == 0))
