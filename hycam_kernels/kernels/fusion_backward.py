r"""Backward of the fusion, from the upstream gradient G of h_out; x is the stream that A_fusion multiplies.

With F = G \odot x, the gradient of A_fusion, and Z_k = s (V_k B_k^T + b_k), which every kernel makes again:

.. math::
    \bar h_{in} &= G \odot A_{fusion},\quad \bar h_{att} = G + \bar h_{in},\quad
        \bar S = F \odot \mathrm{SiLU}'(S),\quad
        \bar p_k = \langle F, \mathrm{SiLU}(Z_k) \rangle_{row} && \text{stream\_grad\_kernel} \\
    D_k &= s\,p_k\, F \odot \mathrm{SiLU}'(Z_k),\quad \bar V_k = D_k B_k && \text{v\_grad\_kernel} \\
    \bar B_k &= D_k^T V_k,\quad \bar b_k = \textstyle\sum_t D_{kt} && \text{b\_grad\_kernel}

Sums that cross programs (p over column blocks, V over splits of d, B over splits of T) are partial sums in float32,
added in a fixed order: no atomics.
"""
# ruff: noqa: N803 (compile-time constants are in capitals)

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import ModulationInputs
from .cost import Cost
from .launch import Launcher, padded_experts, row_stride
from .primitives import (
    chosen_expert,
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
    grad_out, s, v, lora_b, lora_b_bias, probs, attn_output, residual, d_attn, d_residual, d_s, partial_d_probs,
    tokens, d, stride_grad, stride_s, stride_v, stride_attn, stride_residual, scale,
    NUM_EXPERTS: tl.constexpr, PADDED_EXPERTS: tl.constexpr, RANK: tl.constexpr, HARD: tl.constexpr,
    FAST_RECIPROCAL: tl.constexpr, PRECISION: tl.constexpr,
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
        chosen = 0
        if HARD:
            chosen = chosen_expert(probs, rows, row_mask, NUM_EXPERTS, PADDED_EXPERTS)
        partial = partial_d_probs + (column_block.to(tl.int64) * tokens + rows) * NUM_EXPERTS
        for expert in tl.range(0, NUM_EXPERTS, loop_unroll_factor=1):
            z = expert_tile(
                v, lora_b, lora_b_bias, expert, rows, cols, row_mask, col_mask, d, stride_v, scale,
                RANK, BLOCK_T, BLOCK_D, BLOCK_R, PRECISION,
            )  # fmt: skip
            activation = z * sigmoid(z, FAST_RECIPROCAL)
            tl.store(partial + expert, tl.sum(d_fusion * activation, 1), mask=row_mask)
            weight = load_weight(probs, chosen, expert, rows, row_mask, NUM_EXPERTS, HARD)
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
    grad_out, v, lora_b, lora_b_bias, probs, attn_output, residual, partial_d_v,
    tokens, d, columns, stride_grad, stride_v, stride_attn, stride_residual, scale,
    NUM_EXPERTS: tl.constexpr, PADDED_EXPERTS: tl.constexpr, RANK: tl.constexpr, HARD: tl.constexpr,
    FAST_RECIPROCAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One (expert, rank block, token block) over ``columns`` features from split program_id(1) on."""
    rank_blocks: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    expert = tl.program_id(0) % NUM_EXPERTS
    rank_start = tl.program_id(0) // NUM_EXPERTS % rank_blocks * BLOCK_R
    rows = tl.program_id(0) // (NUM_EXPERTS * rank_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    row_mask = rows < tokens
    chosen = 0
    if HARD:
        chosen = chosen_expert(probs, rows, row_mask, NUM_EXPERTS, PADDED_EXPERTS)
    weight = load_weight(probs, chosen, expert, rows, row_mask, NUM_EXPERTS, HARD) * scale
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
def b_grad_kernel(
    grad_out, v, lora_b, lora_b_bias, probs, attn_output, residual, partial_d_b, partial_d_bias,
    tokens, d, tokens_per_split, stride_grad, stride_v, stride_attn, stride_residual, scale,
    NUM_EXPERTS: tl.constexpr, PADDED_EXPERTS: tl.constexpr, RANK: tl.constexpr, HARD: tl.constexpr,
    FAST_RECIPROCAL: tl.constexpr, PRECISION: tl.constexpr,
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
        chosen = 0
        if HARD:
            chosen = chosen_expert(probs, rows, row_mask, NUM_EXPERTS, PADDED_EXPERTS)
        weight = load_weight(probs, chosen, expert, rows, row_mask, NUM_EXPERTS, HARD) * scale
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


class FusionBackward:
    """Launches the backward kernels of one call; every tensor as the forward had it, grad_out [T, d]."""

    def __init__(
        self,
        launch: Launcher,
        x: ModulationInputs,
        grad_out: Tensor,
        s: Tensor | None,
        v: Tensor | None,
        lora_b: Tensor | None,
        probs: Tensor,
    ) -> None:
        self.launch = launch
        self.x = x
        self.s = s
        self.arguments = {
            "grad_out": grad_out,
            "v": v,
            "lora_b": lora_b,
            "lora_b_bias": x.lora_b_bias,
            "probs": probs,
            "attn_output": x.attn_output,
            "residual": x.residual,
            "tokens": grad_out.shape[0],
            "d": grad_out.shape[1],
            "stride_grad": row_stride(grad_out),
            "stride_v": row_stride(v),
            "stride_attn": row_stride(x.attn_output),
            "stride_residual": row_stride(x.residual),
            "scale": x.scale,
            "NUM_EXPERTS": x.num_experts,
            "PADDED_EXPERTS": padded_experts(x.num_experts),
            "RANK": x.rank,
            "HARD": x.hard,
            **launch.arithmetic(x),
        }

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.hidden.device)

    def stream(
        self, *, attn: bool, residual: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of h_att and h_in [T, d] where asked for, of S [T, d], and of p [column blocks, T, E] in parts."""
        x = self.x
        tokens, d = x.hidden.shape
        config = self.launch.config("stream_grad", x)
        column_blocks = triton.cdiv(d, config["BLOCK_D"])
        d_attn = self._empty(tokens, d, dtype=x.attn_output.dtype) if attn else None
        d_residual = self._empty(tokens, d, dtype=x.residual.dtype) if residual and x.residual is not None else None
        d_s = None if self.s is None else self._empty(tokens, d, dtype=x.compute_dtype)
        partial_d_probs = self._empty(column_blocks, tokens, x.num_experts) if x.num_experts else None
        self.launch(
            stream_grad_kernel,
            (triton.cdiv(tokens, config["BLOCK_T"]) * column_blocks,),
            config,
            s=self.s,
            d_attn=d_attn,
            d_residual=d_residual,
            d_s=d_s,
            partial_d_probs=partial_d_probs,
            stride_s=row_stride(self.s),
            **self.arguments,
        )
        return d_attn, d_residual, d_s, partial_d_probs

    def v(self) -> Tensor:
        """Gradient of V, [T, E r] in the compute dtype."""
        x = self.x
        tokens, d = x.hidden.shape
        config = self.launch.config("v_grad", x)
        columns, splits = _split(d, config.pop("SPLITS"), config["BLOCK_D"])
        partial_d_v = self._empty(splits, tokens, x.num_experts * x.rank)
        programs = triton.cdiv(tokens, config["BLOCK_T"]) * x.num_experts * triton.cdiv(x.rank, config["BLOCK_R"])
        self.launch(
            v_grad_kernel, (programs, splits), config, partial_d_v=partial_d_v, columns=columns, **self.arguments
        )
        return _add_parts(partial_d_v).to(x.compute_dtype)

    def b(self) -> tuple[Tensor, Tensor | None]:
        """Gradients of B [E, d, r] and, where there is one, of its bias [E, d], in float32."""
        x = self.x
        tokens, d = x.hidden.shape
        config = self.launch.config("b_grad", x)
        tokens_per_split, splits = _split(tokens, config.pop("SPLITS"), config["BLOCK_T"])
        partial_d_b = self._empty(splits, x.num_experts, d, x.rank)
        partial_d_bias = None if x.lora_b_bias is None else self._empty(splits, x.num_experts, d)
        programs = triton.cdiv(d, config["BLOCK_D"]) * x.num_experts * triton.cdiv(x.rank, config["BLOCK_R"])
        self.launch(
            b_grad_kernel,
            (programs, splits),
            config,
            partial_d_b=partial_d_b,
            partial_d_bias=partial_d_bias,
            tokens_per_split=tokens_per_split,
            **self.arguments,
        )
        return _add_parts(partial_d_b), None if partial_d_bias is None else _add_parts(partial_d_bias)


def _split(length: int, splits: int, block: int) -> tuple[int, int]:
    """Whole blocks per split, and the number of splits that are not empty; 1 of them at least."""
    per_split = max(triton.cdiv(triton.cdiv(length, splits), block), 1) * block
    return per_split, max(triton.cdiv(length, per_split), 1)


def _add_parts(partial: Tensor) -> Tensor:
    return partial[0] if partial.shape[0] == 1 else partial.sum(0)


def fusion_backward_reference(
    grad_out: Tensor,
    s: Tensor | None,
    v: Tensor | None,
    lora_b: Tensor | None,
    lora_b_bias: Tensor | None,
    weights: Tensor,
    attn_output: Tensor,
    residual: Tensor | None,
    scale: float,
) -> dict[str, Tensor]:
    """The equations above on tensors of one dtype; ``weights`` [T, E] are the p that are used."""
    d_fusion = grad_out * (attn_output if residual is None else attn_output + residual)
    fusion = torch.zeros_like(grad_out)
    grads = {}
    if s is not None:
        fusion = F.silu(s)
        grads["s"] = torch.ops.aten.silu_backward(d_fusion, s)
    if v is not None and lora_b is not None:
        v = v.unflatten(1, (lora_b.shape[0], -1))
        z = torch.einsum("ter,edr->ted", v, lora_b)
        z = scale * (z if lora_b_bias is None else z + lora_b_bias)
        fusion = fusion + torch.einsum("te,ted->td", weights, F.silu(z))
        d_k = scale * weights[..., None] * torch.ops.aten.silu_backward(d_fusion[:, None].expand_as(z), z)
        grads["probs"] = (d_fusion[:, None] * F.silu(z)).sum(-1)
        grads["v"] = torch.einsum("ted,edr->ter", d_k, lora_b).flatten(1)
        grads["lora_b"] = torch.einsum("ted,ter->edr", d_k, v)
        grads["lora_b_bias"] = d_k.sum(0)
    grads["residual"] = grad_out * fusion
    grads["attn_output"] = grad_out + grads["residual"]
    return grads


def stream_grad_cost(tokens: int, d: int, num_experts: int, rank: int, *, residual=False, itemsize=2) -> Cost:
    """Reads G, h_att (h_in), S, V, B and p; writes the gradients of h_att (h_in) and S, and of p."""
    activations = (5 + 2 * residual) * tokens * d + tokens * num_experts * rank
    return Cost(
        itemsize * (activations + num_experts * d * rank) + 8 * tokens * num_experts,
        2 * tokens * d * num_experts * rank,
        (1 + num_experts) * tokens * d,
    )


def v_grad_cost(tokens: int, d: int, num_experts: int, rank: int, *, residual=False, itemsize=2) -> Cost:
    """Reads G, h_att (h_in), V, B and p, writes V's gradient in float32; Z again and one more product."""
    products = tokens * num_experts * rank
    activations = (2 + residual) * tokens * d + products
    return Cost(
        itemsize * (activations + num_experts * d * rank) + 4 * (tokens * num_experts + products),
        4 * d * products,
        num_experts * tokens * d,
    )


def b_grad_cost(tokens: int, d: int, num_experts: int, rank: int, *, residual=False, itemsize=2) -> Cost:
    """Reads what `v_grad_cost` reads, writes B's gradient in float32."""
    weight = num_experts * d * rank
    activations = (2 + residual) * tokens * d + tokens * num_experts * rank
    return Cost(
        itemsize * (activations + weight) + 4 * (tokens * num_experts + weight),
        4 * tokens * weight,
        num_experts * tokens * d,
    )
