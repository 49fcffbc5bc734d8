"""Device functions that the fusion kernels share, on tiles of [BLOCK_T tokens, BLOCK_D features].

``None`` for a tensor is a compile-time constant. Loops over experts and rank blocks are dynamic: unrolled, they spill.
"""
# mypy: disable-error-code=assignment

import triton
import triton.language as tl


@triton.jit
def silu_unit(SIGMOID: tl.constexpr):
    """What SiLU's argument z and a gradient of SiLU(z) are multiplied by before the next three functions: 1/2 or 1."""
    if SIGMOID == "tanh.approx" or SIGMOID == "tanh":
        return 0.5
    else:
        return 1.0


@triton.jit
def silu_gate(a, SIGMOID: tl.constexpr):
    """The logistic function of a = z, or the tanh of a = z / 2: one special function where the logistic takes two.

    tanh.approx has a relative error of 2^-11 at most, rcp.approx.ftz of 2^-23: 1 + exp(-a) is never 0, and its infinity
    gives the 0 that is wanted. A full-range division costs about 12 instructions more.
    """
    if SIGMOID == "tanh.approx":
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1)
    elif SIGMOID == "tanh":
        return 2.0 / (1.0 + tl.exp2(a * -2.8853900817779268)) - 1.0
    elif SIGMOID == "rcp.approx":
        denominator = 1.0 + tl.exp2(a * -1.4426950408889634)
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [denominator], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / (1.0 + tl.exp2(a * -1.4426950408889634))


@triton.jit
def silu(a, gate, SIGMOID: tl.constexpr):
    """SiLU(z) from a and its gate: z sigmoid(z) = z / 2 + z / 2 tanh(z / 2)."""
    if SIGMOID == "tanh.approx" or SIGMOID == "tanh":
        return a + a * gate
    else:
        return a * gate


@triton.jit
def silu_gradient(grad, a, gate, SIGMOID: tl.constexpr):
    """The gradient g of SiLU(z) times SiLU'(z), from grad = g `silu_unit`.

    SiLU'(z) = sigmoid(z) + SiLU(z) (1 - sigmoid(z)); with t = tanh(z / 2) it is (1 + t + z / 2 (1 - t^2)) / 2.
    """
    if SIGMOID == "tanh.approx" or SIGMOID == "tanh":
        return grad + grad * (gate + a * (1.0 - gate * gate))
    else:
        return grad * (gate + a * gate * (1.0 - gate))


@triton.jit
def load_tile(tensor, rows, cols, stride, mask):
    """[rows, cols] of a row-strided matrix in float32."""
    return tl.load(tensor + rows.to(tl.int64) * stride + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def as_compute(values, COMPUTE: tl.constexpr):
    """Cast to the dtype of the matrix products."""
    if COMPUTE == "bf16":
        return values.to(tl.bfloat16)
    elif COMPUTE == "fp16":
        return values.to(tl.float16)
    else:
        return values.to(tl.float32)


@triton.jit
def add_block_product(total, left, right, LENGTH: tl.constexpr):
    """total + left right, IEEE products, with the block's LENGTH products summed apart from the total.

    NVIDIA's matrix instructions truncate each sum to float32 (Fasi et al., Numerical behavior of NVIDIA tensor cores,
    2021): in one chain over d the error grows with d. Blocks are added to nearest. The bound on the chain keeps the
    compiler from making the total the product's accumulator.
    """
    return total + tl.dot(left, right, input_precision="ieee", max_num_imprecise_acc=LENGTH)


@triton.jit
def row_product(
    hidden, weight, rows, row_mask, columns, column_mask, start, end, stride_hidden, stride_weight,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WEIGHT_EVICTION: tl.constexpr,
    BLOCK_SUMS: tl.constexpr = False,
):  # fmt: skip
    """h[:, start:end] times the weight's rows ``columns``, both cast to COMPUTE: [BLOCK_T, BLOCK_N] in float32.

    ``WEIGHT_EVICTION`` is "evict_first" where the weight is read once, so that h stays in the cache, else "".
    ``BLOCK_SUMS`` is for a product that is not rounded to 16 bits: `add_block_product`, in IEEE precision.
    """
    product = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    hidden_rows = hidden + rows.to(tl.int64)[:, None] * stride_hidden
    weight_rows = weight + columns.to(tl.int64)[:, None] * stride_weight
    for at in range(start, end, BLOCK_K):
        features = at + tl.arange(0, BLOCK_K)
        inside = (features < end)[None, :]
        h = tl.load(hidden_rows + features[None, :], mask=row_mask[:, None] & inside, other=0.0)
        w = tl.load(
            weight_rows + features[None, :],
            mask=column_mask[:, None] & inside,
            other=0.0,
            eviction_policy=WEIGHT_EVICTION,
        )
        left, right = as_compute(h, COMPUTE), tl.trans(as_compute(w, COMPUTE))
        if BLOCK_SUMS:
            product = add_block_product(product, left, right, BLOCK_K)
        else:
            product = tl.dot(left, right, product, input_precision=PRECISION)
    return product


@triton.jit
def load_stream(attn_output, residual, rows, cols, stride_attn, stride_residual, mask):
    """What A_fusion multiplies: h_att, or the residual stream h_in + h_att."""
    stream = load_tile(attn_output, rows, cols, stride_attn, mask)
    if residual is not None:
        stream += load_tile(residual, rows, cols, stride_residual, mask)
    return stream


@triton.jit
def load_v(v, expert, rows, row_mask, start, stride_v, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """[BLOCK_T, BLOCK_R]: columns start.. of V_k, 0 beyond r."""
    ranks = start + tl.arange(0, BLOCK_R)
    offsets = rows.to(tl.int64)[:, None] * stride_v + expert * RANK + ranks[None, :]
    return tl.load(v + offsets, mask=row_mask[:, None] & (ranks < RANK)[None, :], other=0.0)


@triton.jit
def of_expert(mask, expert, NUM_EXPERTS: tl.constexpr):
    """The mask where there is such an expert; a mask & a scalar is no mask in the interpreter of triton 3.9."""
    return mask & (tl.full(mask.shape, expert, tl.int32) < NUM_EXPERTS)


@triton.jit
def load_b(lora_b, expert, cols, col_mask, start, d, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """[BLOCK_D, BLOCK_R]: columns start.. of the contiguous B_k, 0 beyond r."""
    ranks = start + tl.arange(0, BLOCK_R)
    offsets = (tl.cast(expert, tl.int64) * d + cols)[:, None] * RANK + ranks[None, :]
    return tl.load(lora_b + offsets, mask=col_mask[:, None] & (ranks < RANK)[None, :], other=0.0)


@triton.jit
def load_expert_bias(lora_b_bias, expert, cols, col_mask, d):
    return tl.load(lora_b_bias + expert * d + cols, mask=col_mask, other=0.0).to(tl.float32)


@triton.jit
def expert_tile(
    v, lora_b, lora_b_bias, expert, rows, cols, row_mask, col_mask, d, stride_v, scale,
    RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """scale * (V_k B_k^T + b_k), [BLOCK_T, BLOCK_D] in float32: Z_k, or what `silu_unit` makes of it."""
    z = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    if RANK <= BLOCK_R:
        v_tile = load_v(v, expert, rows, row_mask, 0, stride_v, RANK, BLOCK_R)
        b_tile = load_b(lora_b, expert, cols, col_mask, 0, d, RANK, BLOCK_R)
        z = tl.dot(v_tile, tl.trans(b_tile), z, input_precision=PRECISION)
    else:
        for start in tl.range(0, RANK, BLOCK_R, loop_unroll_factor=1):
            v_tile = load_v(v, expert, rows, row_mask, start, stride_v, RANK, BLOCK_R)
            b_tile = load_b(lora_b, expert, cols, col_mask, start, d, RANK, BLOCK_R)
            z = tl.dot(v_tile, tl.trans(b_tile), z, input_precision=PRECISION)
    if lora_b_bias is not None:
        z += load_expert_bias(lora_b_bias, expert, cols, col_mask, d)[None, :]
    return z * scale


@triton.jit
def load_weight(weights, expert, rows, row_mask, NUM_EXPERTS: tl.constexpr):
    """p_k as the output uses it, [BLOCK_T]."""
    return tl.load(weights + rows.to(tl.int64) * NUM_EXPERTS + expert, mask=row_mask, other=0.0)


@triton.jit
def load_all_v(
    v, rows, row_mask, stride_v, NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """Every expert's V_k, [BLOCK_T, BLOCK_R] each, which stay in shared memory where a loop multiplies by them."""
    tiles = ()
    for expert in tl.static_range(NUM_EXPERTS):
        tiles = tiles + (load_v(v, expert, rows, row_mask, 0, stride_v, RANK, BLOCK_R),)
    return tiles


@triton.jit
def load_all_weights(weights, rows, row_mask, NUM_EXPERTS: tl.constexpr):
    """Every expert's p_k, [BLOCK_T] each."""
    loaded = ()
    for expert in tl.static_range(NUM_EXPERTS):
        loaded = loaded + (load_weight(weights, expert, rows, row_mask, NUM_EXPERTS),)
    return loaded


@triton.jit
def resident_tile(
    v_tile, b_tile, lora_b_bias, expert, start, col_mask, d, scale, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """`expert_tile` of a V_k that is at hand, for the columns from ``start`` on."""
    z = tl.dot(v_tile, tl.trans(b_tile), input_precision=PRECISION)
    if lora_b_bias is not None:
        # one uniform base an expert: with the start in the lanes' offsets the addresses cost registers, and spill
        bias = tl.load(lora_b_bias + (expert * d + start) + tl.arange(0, BLOCK_D), mask=col_mask, other=0.0)
        z += bias.to(tl.float32)[None, :]
    return z * scale


@triton.jit
def add_experts(
    fusion, v, lora_b, lora_b_bias, weights, rows, cols, row_mask, col_mask, d, stride_v, scale,
    NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr, SIGMOID: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """fusion + sum_k p_k SiLU(Z_k), [BLOCK_T, BLOCK_D]."""
    if NUM_EXPERTS > 0:
        scale *= silu_unit(SIGMOID)
        for expert in tl.range(0, NUM_EXPERTS, loop_unroll_factor=1):
            a = expert_tile(
                v, lora_b, lora_b_bias, expert, rows, cols, row_mask, col_mask, d, stride_v, scale,
                RANK, BLOCK_T, BLOCK_D, BLOCK_R, PRECISION,
            )  # fmt: skip
            weight = load_weight(weights, expert, rows, row_mask, NUM_EXPERTS)
            fusion += weight[:, None] * silu(a, silu_gate(a, SIGMOID), SIGMOID)
    return fusion


@triton.jit
def store_modulated(
    fusion, attn_output, residual, out, rows, cols, row_mask, col_mask, d, stride_attn, stride_residual
):  # fmt: skip
    """out = h_att + x * fusion, x = h_att or h_in + h_att."""
    mask = row_mask[:, None] & col_mask[None, :]
    attn = load_tile(attn_output, rows[:, None], cols[None, :], stride_attn, mask)
    stream = attn
    if residual is not None:
        stream += load_tile(residual, rows[:, None], cols[None, :], stride_residual, mask)
    result = attn + stream * fusion
    tl.store(out + rows.to(tl.int64)[:, None] * d + cols[None, :], result.to(out.dtype.element_ty), mask=mask)
