"""The kernels of `fusion_backward`; equations and launchers are there."""
# mypy: disable-error-code=assignment

import triton
import triton.language as tl

from hycam_kernels.backends.triton.kernels.primitives import (
    expert_tile,
    load_b,
    load_expert_bias,
    load_stream,
    load_tile,
    load_v,
    load_weight,
    sigmoid,
    silu_derivative,
)


@triton.jit
def stream_grad_kernel(
    grad_out, s, v, lora_b, lora_b_bias, weights, attn_output, residual, d_attn, d_residual, d_s, partial_d_probs,
    tokens, d, stride_grad, stride_s, stride_v, stride_attn, stride_residual, scale,
    NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr, FAST_RECIPROCAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    column_blocks = tl.cdiv(d, BLOCK_D)
    column_block = tl.program_id(0) % column_blocks
    rows = tl.program_id(0) // column_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
    row_mask = rows < tokens
    col_mask = cols < d
    mask = row_mask[:, None] & col_mask[None, :]

    grad = load_tile(grad_out, rows[:, None], cols[None, :], stride_grad, mask)
    stream = load_stream(attn_output, residual, rows[:, None], cols[None, :], stride_attn, stride_residual, mask)
    d_fusion = grad * stream
    contiguous = rows.to(tl.int64)[:, None] * d + cols[None, :]

    fusion = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    if s is not None:
        s_tile = load_tile(s, rows[:, None], cols[None, :], stride_s, mask)
        gate = sigmoid(s_tile, FAST_RECIPROCAL)
        fusion = s_tile * gate
        tl.store(d_s + contiguous, (d_fusion * silu_derivative(fusion, gate)).to(d_s.dtype.element_ty), mask=mask)
    if NUM_EXPERTS > 0:
        partial = partial_d_probs + (column_block.to(tl.int64) * tokens + rows) * NUM_EXPERTS
        for expert in tl.range(0, NUM_EXPERTS, loop_unroll_factor=1):
            z = expert_tile(
                v, lora_b, lora_b_bias, expert, rows, cols, row_mask, col_mask, d, stride_v, scale,
                RANK, BLOCK_T, BLOCK_D, BLOCK_R, PRECISION,
            )  # fmt: skip
            activation = z * sigmoid(z, FAST_RECIPROCAL)
            tl.store(partial + expert, tl.sum(d_fusion * activation, 1), mask=row_mask)
            weight = load_weight(weights, expert, rows, row_mask, NUM_EXPERTS)
            fusion += weight[:, None] * activation

    # read again: held through the loop it would cost a tile of registers
    grad = load_tile(grad_out, rows[:, None], cols[None, :], stride_grad, mask)
    through_stream = grad * fusion
    if d_residual is not None:
        tl.store(d_residual + contiguous, through_stream.to(d_residual.dtype.element_ty), mask=mask)
    if d_attn is not None:
        tl.store(d_attn + contiguous, (grad + through_stream).to(d_attn.dtype.element_ty), mask=mask)


@triton.jit
def v_grad_kernel(
    grad_out, v, lora_b, lora_b_bias, weights, attn_output, residual, partial_d_v,
    tokens, d, columns, stride_grad, stride_v, stride_attn, stride_residual, scale,
    NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr, FAST_RECIPROCAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One (expert, rank block, token block) over ``columns`` features from split program_id(1) on."""
    rank_blocks: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    expert = tl.program_id(0) % NUM_EXPERTS
    rank_start = tl.program_id(0) // NUM_EXPERTS % rank_blocks * BLOCK_R
    rows = tl.program_id(0) // (NUM_EXPERTS * rank_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    row_mask = rows < tokens
    weight = load_weight(weights, expert, rows, row_mask, NUM_EXPERTS) * scale
    if rank_blocks == 1:
        v_tile = load_v(v, expert, rows, row_mask, 0, stride_v, RANK, BLOCK_R)

    d_v = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    end = tl.minimum((split + 1) * columns, d)
    for start in range(split * columns, end, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        col_mask = cols < end
        mask = row_mask[:, None] & col_mask[None, :]
        grad = load_tile(grad_out, rows[:, None], cols[None, :], stride_grad, mask)
        stream = load_stream(attn_output, residual, rows[:, None], cols[None, :], stride_attn, stride_residual, mask)
        b_tile = load_b(lora_b, expert, cols, col_mask, rank_start, d, RANK, BLOCK_R)
        if rank_blocks == 1:
            z = tl.dot(v_tile, tl.trans(b_tile), input_precision=PRECISION)
            if lora_b_bias is not None:
                z += load_expert_bias(lora_b_bias, expert, cols, col_mask, d)[None, :]
            z *= scale
        else:
            z = expert_tile(
                v, lora_b, lora_b_bias, expert, rows, cols, row_mask, col_mask, d, stride_v, scale,
                RANK, BLOCK_T, BLOCK_D, BLOCK_R, PRECISION,
            )  # fmt: skip
        gate = sigmoid(z, FAST_RECIPROCAL)
        d_z = grad * stream * weight[:, None] * silu_derivative(z * gate, gate)
        d_v = tl.dot(d_z.to(b_tile.dtype), b_tile, d_v, input_precision=PRECISION)

    ranks = rank_start + tl.arange(0, BLOCK_R)
    offsets = (split.to(tl.int64) * tokens + rows)[:, None] * (NUM_EXPERTS * RANK) + expert * RANK + ranks[None, :]
    tl.store(partial_d_v + offsets, d_v, mask=row_mask[:, None] & (ranks < RANK)[None, :])


@triton.jit
def row_grad_kernel(
    grad_out, s, v, lora_b, lora_b_bias, weights, attn_output, residual,
    d_attn, d_residual, d_s, partial_d_probs, partial_d_v,
    tokens, d, columns, stride_grad, stride_s, stride_v, stride_attn, stride_residual, scale,
    NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr, FAST_RECIPROCAL: tl.constexpr, PRECISION: tl.constexpr,
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
        mask = row_mask[:, None] & col_mask[None, :]
        contiguous = rows.to(tl.int64)[:, None] * d + cols[None, :]
        grad = load_tile(grad_out, rows[:, None], cols[None, :], stride_grad, mask)
        stream = load_stream(attn_output, residual, rows[:, None], cols[None, :], stride_attn, stride_residual, mask)
        d_fusion = grad * stream
        fusion = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        if s is not None:
            s_tile = load_tile(s, rows[:, None], cols[None, :], stride_s, mask)
            gate = sigmoid(s_tile, FAST_RECIPROCAL)
            fusion = s_tile * gate
            tl.store(d_s + contiguous, (d_fusion * silu_derivative(fusion, gate)).to(d_s.dtype.element_ty), mask=mask)
        next_d_v = ()
        next_d_p = ()
        for expert in tl.static_range(NUM_EXPERTS):
            v_tile = load_v(v, expert, rows, row_mask, 0, stride_v, RANK, BLOCK_R)
            b_tile = load_b(lora_b, expert, cols, col_mask, 0, d, RANK, BLOCK_R)
            z = tl.dot(v_tile, tl.trans(b_tile), input_precision=PRECISION)
            if lora_b_bias is not None:
                # one uniform base per expert: as expert * d + cols the addresses cost 70 registers, and spill
                bias = tl.load(lora_b_bias + (expert * d + start) + tl.arange(0, BLOCK_D), mask=col_mask, other=0.0)
                z += bias.to(tl.float32)[None, :]
            z *= scale
            weight = load_weight(weights, expert, rows, row_mask, NUM_EXPERTS)
            gate = sigmoid(z, FAST_RECIPROCAL)
            activation = z * gate
            fusion += weight[:, None] * activation
            next_d_p = next_d_p + (d_p[expert] + tl.sum(d_fusion * activation, 1),)
            d_z = d_fusion * (weight * scale)[:, None] * silu_derivative(activation, gate)
            next_d_v = next_d_v + (tl.dot(d_z.to(b_tile.dtype), b_tile, d_v[expert], input_precision=PRECISION),)
        d_v = next_d_v
        d_p = next_d_p
        # read again: held through the experts it would cost a tile of registers
        grad = load_tile(grad_out, rows[:, None], cols[None, :], stride_grad, mask)
        through_stream = grad * fusion
        if d_residual is not None:
            tl.store(d_residual + contiguous, through_stream.to(d_residual.dtype.element_ty), mask=mask)
        if d_attn is not None:
            tl.store(d_attn + contiguous, (grad + through_stream).to(d_attn.dtype.element_ty), mask=mask)

    ranks = tl.arange(0, BLOCK_R)
    partial_rows = split.to(tl.int64) * tokens + rows
    for expert in tl.static_range(NUM_EXPERTS):
        tl.store(partial_d_probs + partial_rows * NUM_EXPERTS + expert, d_p[expert], mask=row_mask)
        offsets = partial_rows[:, None] * (NUM_EXPERTS * RANK) + expert * RANK + ranks[None, :]
        tl.store(partial_d_v + offsets, d_v[expert], mask=row_mask[:, None] & (ranks < RANK)[None, :])


@triton.jit
def b_grad_kernel(
    grad_out, v, lora_b, lora_b_bias, weights, attn_output, residual, partial_d_b, partial_d_bias,
    tokens, d, tokens_per_split, stride_grad, stride_v, stride_attn, stride_residual, scale,
    NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr, FAST_RECIPROCAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One (expert, rank block, feature block) over the tokens of split program_id(1).

    Tiles are transposed, [BLOCK_D, BLOCK_T]: Z^T = B V^T, so that dZ^T is the second product's left operand as it lies.
    """
    rank_blocks: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    expert = tl.program_id(0) % NUM_EXPERTS
    rank_start = tl.program_id(0) // NUM_EXPERTS % rank_blocks * BLOCK_R
    cols = tl.program_id(0) // (NUM_EXPERTS * rank_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    col_mask = cols < d
    if rank_blocks == 1:
        b_tile = load_b(lora_b, expert, cols, col_mask, 0, d, RANK, BLOCK_R)

    d_b = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    d_bias = tl.zeros((BLOCK_D,), tl.float32)
    end = tl.minimum((split + 1) * tokens_per_split, tokens)
    for start in range(split * tokens_per_split, end, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        row_mask = rows < end
        mask = col_mask[:, None] & row_mask[None, :]
        grad = load_tile(grad_out, rows[None, :], cols[:, None], stride_grad, mask)
        stream = load_stream(attn_output, residual, rows[None, :], cols[:, None], stride_attn, stride_residual, mask)
        v_tile = load_v(v, expert, rows, row_mask, rank_start, stride_v, RANK, BLOCK_R)
        if rank_blocks == 1:
            z = tl.dot(b_tile, tl.trans(v_tile), input_precision=PRECISION)
        else:
            z = tl.zeros((BLOCK_D, BLOCK_T), tl.float32)
            for part in tl.range(0, RANK, BLOCK_R, loop_unroll_factor=1):
                b_part = load_b(lora_b, expert, cols, col_mask, part, d, RANK, BLOCK_R)
                v_part = load_v(v, expert, rows, row_mask, part, stride_v, RANK, BLOCK_R)
                z = tl.dot(b_part, tl.trans(v_part), z, input_precision=PRECISION)
        if lora_b_bias is not None:
            z += load_expert_bias(lora_b_bias, expert, cols, col_mask, d)[:, None]
        z *= scale
        weight = load_weight(weights, expert, rows, row_mask, NUM_EXPERTS) * scale
        gate = sigmoid(z, FAST_RECIPROCAL)
        d_z = grad * stream * weight[None, :] * silu_derivative(z * gate, gate)
        if partial_d_bias is not None:
            d_bias += tl.sum(d_z, 1)
        d_b = tl.dot(d_z.to(v_tile.dtype), v_tile, d_b, input_precision=PRECISION)

    ranks = rank_start + tl.arange(0, BLOCK_R)
    features = (split.to(tl.int64) * NUM_EXPERTS + expert) * d + cols
    mask = col_mask[:, None] & (ranks < RANK)[None, :]
    tl.store(partial_d_b + features[:, None] * RANK + ranks[None, :], d_b, mask=mask)
    if partial_d_bias is not None:
        tl.store(partial_d_bias + features, d_bias, mask=col_mask & (rank_start == 0))
