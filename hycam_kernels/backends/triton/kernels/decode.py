r"""Decoding, 1 to 64 tokens without gradients: two launches that read every weight once, as it is stored.

With so few tokens the work is the reading of W_s, A, B and W_r. N is not folded into A, which would read A twice and
write it once more: it follows A h, a product of [T, r] by [r, r] that every program of the second kernel repeats.

.. math::
    [U_j \mid L_j] &= h_j\,[A \mid W_r]_j^T \quad\text{for split j of d} && \text{decode\_down\_kernel} \\
    V_k &= \Big(\sum_j U_{kj} + a_k\Big) N_k^T + n_k,\quad \ell = \sum_j L_j + b_r,\quad
        p = \mathrm{softmax}((\ell + g) / \tau), \\
    h_{out} &= h_{att} + x \odot \Big(\mathrm{SiLU}(h W_s^T + b_s)
        + \sum_k p_k\,\mathrm{SiLU}(s\,(V_k B_k^T + b_k))\Big) && \text{decode\_fusion\_kernel}

A program of the second kernel makes a block of output features for all tokens. It streams its rows of W_s first, which
needs nothing of the first kernel: with programmatic dependent launch (sm_90 and later) the two overlap. Split sums are
added in a fixed order; the token means are made by the first program alone. No atomics, nothing read back by the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hycam_kernels.backends.triton.kernels.cost import Cost
from hycam_kernels.backends.triton.kernels.primitives import (
    as_compute,
    load_b,
    load_expert_bias,
    row_product,
    silu,
    silu_gate,
    silu_unit,
    store_modulated,
)
from hycam_kernels.backends.triton.kernels.router import device_seed, gumbel_noise, mask_bytes, softmax_rows
from hycam_kernels.backends.triton.launch import COMPUTE_NAMES, Launcher, dense_rows, padded_experts, row_stride
from hycam_kernels.inputs import ModulationInputs


@triton.jit
def decode_down_kernel(
    hidden, lora_a, router_weight, partial,
    tokens, d, stride_hidden, stride_router,
    NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Columns of A h, or in the last blocks of W_r h, over split program_id(1) of d."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    low_rank: tl.constexpr = NUM_EXPERTS * RANK
    low_rank_blocks: tl.constexpr = (low_rank + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0)
    split = tl.program_id(1)
    width = tl.cdiv(tl.cdiv(d, SPLITS), BLOCK_K) * BLOCK_K
    start = split * width
    end = tl.minimum(start + width, d)
    rows = tl.arange(0, BLOCK_T)
    row_mask = rows < tokens
    if block < low_rank_blocks:
        columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
        column_mask = columns < low_rank
        product = row_product(
            hidden, lora_a, rows, row_mask, columns, column_mask, start, end, stride_hidden, d,
            COMPUTE, PRECISION, BLOCK_T, BLOCK_N, BLOCK_K, "evict_first",
        )  # fmt: skip
        first = 0
    else:
        columns = (block - low_rank_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        column_mask = columns < NUM_EXPERTS
        product = row_product(
            hidden, router_weight, rows, row_mask, columns, column_mask, start, end, stride_hidden, stride_router,
            COMPUTE, "ieee", BLOCK_T, BLOCK_N, BLOCK_K, "evict_first", BLOCK_SUMS=True,
        )  # fmt: skip
        first = low_rank
    offsets = (split * tokens + rows)[:, None] * (low_rank + NUM_EXPERTS) + first + columns[None, :]
    tl.store(partial + offsets, product, mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def split_sum(
    partial, rows, row_mask, columns, column_mask, tokens,
    WIDTH: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Columns of the split partial products, added in order: [BLOCK_T, BLOCK_N]."""
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    mask = row_mask[:, None] & column_mask[None, :]
    for split in tl.static_range(SPLITS):
        offsets = (split * tokens + rows)[:, None] * WIDTH + columns[None, :]
        total += tl.load(partial + offsets, mask=mask, other=0.0)
    return total


@triton.jit
def decode_fusion_kernel(
    hidden, shared_weight, shared_bias, partial, lora_a_bias, lora_n, lora_n_bias, lora_b, lora_b_bias,
    router_bias, gumbel, seed, token_mask, attn_output, residual,
    out, load, router_prob, balance_loss,
    tokens, d, stride_hidden, stride_shared, stride_attn, stride_residual, tau, scale,
    NUM_EXPERTS: tl.constexpr, PADDED_EXPERTS: tl.constexpr, RANK: tl.constexpr, HARD: tl.constexpr,
    SIGMOID: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_T)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_mask = rows < tokens
    col_mask = cols < d

    fusion = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    if shared_weight is not None:
        s = row_product(
            hidden, shared_weight, rows, row_mask, cols, col_mask, 0, d, stride_hidden, stride_shared,
            COMPUTE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_K, "evict_first",
        )  # fmt: skip
        if shared_bias is not None:
            s += tl.load(shared_bias + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        a = s * silu_unit(SIGMOID)
        fusion = silu(a, silu_gate(a, SIGMOID), SIGMOID)
    if PDL:
        tl.extra.cuda.gdc_wait()

    first_program = tl.program_id(0) == 0
    if NUM_EXPERTS == 0:
        tl.store(balance_loss, 0.0, mask=first_program)
    else:
        width: tl.constexpr = NUM_EXPERTS * (RANK + 1)
        experts = tl.arange(0, PADDED_EXPERTS)
        expert_mask = experts < NUM_EXPERTS
        router_mask = row_mask[:, None] & expert_mask[None, :]
        logit = split_sum(
            partial, rows, row_mask, NUM_EXPERTS * RANK + experts, expert_mask, tokens,
            width, SPLITS, BLOCK_T, PADDED_EXPERTS,
        )  # fmt: skip
        if router_bias is not None:
            logit += tl.load(router_bias + experts, mask=expert_mask, other=0.0).to(tl.float32)[None, :]
        noisy = logit
        offsets = rows[:, None] * NUM_EXPERTS + experts[None, :]
        if gumbel is not None:
            noisy += tl.load(gumbel + offsets, mask=router_mask, other=0.0).to(tl.float32)
        if seed is not None:
            noisy += gumbel_noise(seed, rows, experts, NUM_EXPERTS)
        p = softmax_rows(noisy / tau, expert_mask[None, :])
        used = p
        if HARD:
            used = tl.where(tl.argmax(p, 1)[:, None] == experts[None, :], 1.0, 0.0) + (p - p)  # NaN stays NaN

        if first_program:
            counted = row_mask
            if token_mask is not None:
                counted = tl.load(token_mask + rows, mask=row_mask, other=0) != 0
            count = tl.maximum(tl.sum(tl.where(counted, 1.0, 0.0), 0), 1.0)
            q = softmax_rows(logit, expert_mask[None, :])
            # chosen, not multiplied by 0: a token that doesn't count may hold NaN
            mean_p = tl.sum(tl.where(counted[:, None], used, 0.0), 0) / count
            mean_q = tl.sum(tl.where(counted[:, None], q, 0.0), 0) / count
            tl.store(load + experts, mean_p, mask=expert_mask)
            tl.store(router_prob + experts, mean_q, mask=expert_mask)
            tl.store(balance_loss, tl.sum(mean_p * mean_q, 0))

        for expert in tl.range(0, NUM_EXPERTS, num_stages=1, loop_unroll_factor=1):
            z = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
            for start in tl.range(0, RANK, BLOCK_R, num_stages=1, loop_unroll_factor=1):
                v = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
                out_ranks = start + tl.arange(0, BLOCK_R)
                for inner in tl.range(0, RANK, BLOCK_R, num_stages=1, loop_unroll_factor=1):
                    in_ranks = inner + tl.arange(0, BLOCK_R)
                    in_mask = in_ranks < RANK
                    u = split_sum(
                        partial, rows, row_mask, expert * RANK + in_ranks, in_mask, tokens,
                        width, SPLITS, BLOCK_T, BLOCK_R,
                    )  # fmt: skip
                    if lora_a_bias is not None:
                        u += tl.load(lora_a_bias + expert * RANK + in_ranks, mask=in_mask, other=0.0).to(tl.float32)
                    n_offsets = (expert * RANK + out_ranks)[:, None] * RANK + in_ranks[None, :]
                    n_mask = (out_ranks < RANK)[:, None] & in_mask[None, :]
                    n = tl.load(lora_n + n_offsets, mask=n_mask, other=0.0)
                    v = tl.dot(as_compute(u, COMPUTE), tl.trans(as_compute(n, COMPUTE)), v, input_precision=PRECISION)
                if lora_n_bias is not None:
                    bias_mask = out_ranks < RANK
                    v += tl.load(lora_n_bias + expert * RANK + out_ranks, mask=bias_mask, other=0.0).to(tl.float32)
                b = load_b(lora_b, expert, cols, col_mask, start, d, RANK, BLOCK_R)
                z = tl.dot(as_compute(v, COMPUTE), tl.trans(as_compute(b, COMPUTE)), z, input_precision=PRECISION)
            if lora_b_bias is not None:
                z += load_expert_bias(lora_b_bias, expert, cols, col_mask, d)[None, :]
            a = z * (scale * silu_unit(SIGMOID))
            weight = tl.sum(tl.where(experts[None, :] == expert, used, 0.0), 1)
            fusion += weight[:, None] * silu(a, silu_gate(a, SIGMOID), SIGMOID)

    store_modulated(
        fusion, attn_output, residual, out, rows, cols, row_mask, col_mask, d, stride_attn, stride_residual
    )  # fmt: skip


def decode_forward(launch: Launcher, x: ModulationInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h_out [T, d], load [E], router_prob [E] and the balance loss, a scalar."""
    tokens, d = x.hidden.shape
    num_experts = x.num_experts

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.hidden.device)

    out = empty(tokens, d, dtype=x.attn_output.dtype)
    load, router_prob, balance_loss = empty(num_experts), empty(num_experts), empty()
    constants = launch.arithmetic(x)
    config = launch.config("decode_fusion", x)
    shared = {
        "hidden": x.hidden,
        "tokens": tokens,
        "d": d,
        "stride_hidden": row_stride(x.hidden),
        "NUM_EXPERTS": num_experts,
        "RANK": x.rank,
        "COMPUTE": COMPUTE_NAMES[x.compute_dtype],
        "PRECISION": constants["PRECISION"],
        "SPLITS": config.pop("SPLITS"),
        "BLOCK_T": max(16, triton.next_power_of_2(tokens)),
        "PDL": config.pop("PDL", False) and launch.inline_assembly and num_experts > 0,
    }
    # Whatever makes a tensor comes before both launches: the second may begin when the launch before it does, and waits
    # for that one alone.
    shared_weight = dense_rows(x.shared_weight)
    tensors = {
        "shared_weight": shared_weight,
        "shared_bias": _dense(x.shared_bias),
        "lora_a_bias": _dense(x.lora_a_bias),
        "lora_n": _dense(x.lora_n),
        "lora_n_bias": _dense(x.lora_n_bias),
        "lora_b": _dense(x.lora_b),
        "lora_b_bias": _dense(x.lora_b_bias),
        "router_bias": _dense(x.router_bias),
        "gumbel": _dense(x.gumbel),
        "seed": device_seed(x),
        "token_mask": mask_bytes(x),
    }
    partial = None
    if num_experts:
        assert x.lora_a is not None
        router_weight = dense_rows(x.router_weight)
        partial = empty(shared["SPLITS"], tokens, num_experts * (x.rank + 1))
        down = launch.config("decode_down", x)
        blocks = triton.cdiv(num_experts * x.rank, down["BLOCK_N"]) + triton.cdiv(num_experts, down["BLOCK_N"])
        launch(
            decode_down_kernel,
            (blocks, shared["SPLITS"]),
            down,
            lora_a=x.lora_a.contiguous(),
            router_weight=router_weight,
            partial=partial,
            stride_router=row_stride(router_weight),
            **shared,
        )
    launch(
        decode_fusion_kernel,
        (triton.cdiv(d, config["BLOCK_D"]),),
        config | ({"launch_pdl": True} if shared["PDL"] else {}),
        partial=partial,
        attn_output=x.attn_output,
        residual=x.residual,
        out=out,
        load=load,
        router_prob=router_prob,
        balance_loss=balance_loss,
        stride_shared=row_stride(shared_weight),
        stride_attn=row_stride(x.attn_output),
        stride_residual=row_stride(x.residual),
        tau=x.tau,
        scale=x.scale,
        PADDED_EXPERTS=padded_experts(num_experts),
        HARD=x.hard,
        SIGMOID=constants["SIGMOID"],
        **tensors,
        **shared,
    )
    return out, load, router_prob, balance_loss


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def decode_cost(tokens: int, d: int, num_experts: int, rank: int, *, shared=True, residual=False, itemsize=2) -> Cost:
    """Reads W_s, A, N, B, W_r, h, h_att (h_in) once, writes h_out; four products."""
    weights = shared * d * d + num_experts * (2 * rank * d + rank * rank + d)
    activations = (3 + residual) * tokens * d
    columns = shared * d + num_experts * (2 * rank + 1)
    return Cost(
        itemsize * (weights + activations),
        2 * tokens * (d * columns + num_experts * rank * rank),
        (shared + num_experts) * tokens * d,
    )


def decode_down_cost(tokens: int, d: int, num_experts: int, rank: int, *, splits: int, itemsize=2) -> Cost:
    """Reads h, A and W_r once, writes the split sums; two products."""
    columns = num_experts * (rank + 1)
    return Cost(itemsize * (tokens + columns) * d + 4 * splits * tokens * columns, 2 * tokens * d * columns)


def decode_fusion_cost(
    tokens: int, d: int, num_experts: int, rank: int, *, splits: int, shared=True, residual=False, itemsize=2
) -> Cost:
    """`decode_cost` without what `decode_down_cost` counts, h read and the split sums read once more."""
    whole = decode_cost(tokens, d, num_experts, rank, shared=shared, residual=residual, itemsize=itemsize)
    down = decode_down_cost(tokens, d, num_experts, rank, splits=0, itemsize=itemsize)
    split_sums = 4 * splits * tokens * num_experts * (rank + 1)
    activations = itemsize * tokens * d * (1 if shared else 0)
    return Cost(whole.bytes - down.bytes + activations + split_sums, whole.flops - down.flops, whole.sigmoids)
