r"""The layer's input norm with the low-rank projections and the router's logits, forward and backward.

.. math::
    \hat x = (x - \mu)\,\rho,\quad h = \hat x \odot w + b,\quad [V \mid \ell] = h\,[M \mid W_r]^T,\quad
    \rho = 1 / \sqrt{\mathrm{mean}((x - \mu)^2) + \epsilon}

with mu the row's mean for a LayerNorm and 0 for an RMSNorm. A forward program owns BLOCK_T rows and BLOCK_N columns of
[V | l]: it reads its rows for the statistics and again, from the L2 cache, for h, of which each tile goes straight into
the product; the programs of the first columns write h. Statistics over blocks of features are combined as Chan, Golub
and LeVeque do (1979): no sum of squares that cancels.

Backward, from the whole gradient G of h, with c = G \odot w:

.. math::
    \bar x = \rho\,(c - \hat x\,\mathrm{mean}(c \odot \hat x) - \mathrm{mean}(c)),\quad
    \bar w = \sum_t G \odot \hat x,\quad \bar b = \sum_t G

(mean(c) for a LayerNorm alone). A backward program holds one row at a time, so each tensor is read once; it sums its
rows' share of the weight's gradient, and the shares are added in a fixed order: no atomics.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hycam_kernels.backends.triton.kernels.cost import Cost
from hycam_kernels.backends.triton.kernels.primitives import load_tile
from hycam_kernels.backends.triton.launch import Launcher, row_stride
from hycam_kernels.inputs import NormProjectInputs


@triton.jit
def row_statistics(
    hidden_in, rows, row_mask, d, stride_in, eps,
    CENTRED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """mu (0 for an RMSNorm) and rho of each row, [BLOCK_T] in float32."""
    mean = tl.zeros((BLOCK_T,), tl.float32)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, d, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        col_mask = cols < d
        x = load_tile(hidden_in, rows[:, None], cols[None, :], stride_in, row_mask[:, None] & col_mask[None, :])
        if CENTRED:
            count = tl.minimum(d - start, BLOCK_D).to(tl.float32)
            block_mean = tl.sum(x, 1) / count
            centred = tl.where(col_mask[None, :], x - block_mean[:, None], 0.0)
            step = block_mean - mean
            share = count / (start + count)
            mean += step * share
            squares += tl.sum(centred * centred, 1) + step * step * share * start
        else:
            squares += tl.sum(x * x, 1)
    return mean, 1.0 / tl.sqrt_rn(squares / d + eps)


@triton.jit
def norm_projection_kernel(
    hidden_in, norm_weight, norm_bias, projection, hidden, v, logits, mean, rstd,
    tokens, d, stride_in, eps,
    LOW_RANK: tl.constexpr, NUM_EXPERTS: tl.constexpr, CENTRED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``projection`` holds M's E r = LOW_RANK rows, then W_r's, in the dtype of the product."""
    column_blocks: tl.constexpr = (LOW_RANK + NUM_EXPERTS + BLOCK_N - 1) // BLOCK_N
    column_block = tl.program_id(0) % column_blocks
    rows = tl.program_id(0) // column_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < tokens
    column_mask = columns < LOW_RANK + NUM_EXPERTS

    centre, scale = row_statistics(hidden_in, rows, row_mask, d, stride_in, eps, CENTRED, BLOCK_T, BLOCK_D)
    product = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(0, d, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        col_mask = cols < d
        mask = row_mask[:, None] & col_mask[None, :]
        x = load_tile(hidden_in, rows[:, None], cols[None, :], stride_in, mask)
        w = tl.load(norm_weight + cols, mask=col_mask, other=0.0).to(tl.float32)
        if CENTRED:
            h = (x - centre[:, None]) * scale[:, None] * w[None, :]
            if norm_bias is not None:
                h += tl.load(norm_bias + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        else:
            # rounded to the input's dtype before the weight, as transformers' Llama does
            h = (x * scale[:, None]).to(hidden_in.dtype.element_ty).to(tl.float32) * w[None, :]
        h = h.to(hidden.dtype.element_ty)
        if column_block == 0:
            tl.store(hidden + rows.to(tl.int64)[:, None] * d + cols[None, :], h, mask=mask)
        weight = tl.load(
            projection + columns.to(tl.int64)[:, None] * d + cols[None, :],
            mask=column_mask[:, None] & col_mask[None, :],
            other=0.0,
        )
        operand = h.to(projection.dtype.element_ty)
        product = tl.dot(operand, tl.trans(weight), product, input_precision=PRECISION)

    if column_block == 0:
        tl.store(rstd + rows, scale, mask=row_mask)
        if CENTRED:
            tl.store(mean + rows, centre, mask=row_mask)
    wide_rows = rows.to(tl.int64)[:, None]
    v_mask = row_mask[:, None] & (columns < LOW_RANK)[None, :]
    tl.store(v + wide_rows * LOW_RANK + columns[None, :], product.to(v.dtype.element_ty), mask=v_mask)
    logit_mask = row_mask[:, None] & (column_mask & (columns >= LOW_RANK))[None, :]
    tl.store(logits + wide_rows * NUM_EXPERTS + (columns - LOW_RANK)[None, :], product, mask=logit_mask)


@triton.jit
def norm_backward_kernel(
    gradient, hidden_in, norm_weight, mean, rstd, d_hidden_in, partial_d_weight, partial_d_bias,
    tokens, d, rows_per_program, stride_gradient, stride_in,
    CENTRED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row at a time, whole: BLOCK_D >= d."""
    cols = tl.arange(0, BLOCK_D)
    mask = cols < d
    w = tl.load(norm_weight + cols, mask=mask, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK_D,), tl.float32)
    d_bias = tl.zeros((BLOCK_D,), tl.float32)
    first = tl.program_id(0) * rows_per_program
    for row in tl.range(first, tl.minimum(first + rows_per_program, tokens)):
        wide_row = tl.cast(row, tl.int64)
        g = tl.load(gradient + wide_row * stride_gradient + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(hidden_in + wide_row * stride_in + cols, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row)
        if CENTRED:
            x -= tl.load(mean + row)
        normalised = x * scale
        c = g * w
        inner = c - normalised * (tl.sum(c * normalised, 0) / d)
        if CENTRED:
            inner -= tl.sum(c, 0) / d
        if d_hidden_in is not None:
            result = (inner * scale).to(d_hidden_in.dtype.element_ty)
            tl.store(d_hidden_in + wide_row * d + cols, result, mask=mask)
        d_weight += g * normalised
        if partial_d_bias is not None:
            d_bias += g
    partial = tl.program_id(0).to(tl.int64) * d + cols
    if partial_d_weight is not None:
        tl.store(partial_d_weight + partial, d_weight, mask=mask)
    if partial_d_bias is not None:
        tl.store(partial_d_bias + partial, d_bias, mask=mask)


def norm_projection(
    launch: Launcher, x: NormProjectInputs, projection: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h [T, d], V [T, E r], logits [T, E], mu [T] (0 elements for an RMSNorm) and rho [T].

    ``projection`` [E r + E or more, d] in the compute dtype: M, then W_r.
    """
    tokens, d = x.shape
    low_rank = x.num_experts * x.rank

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.hidden_in.device)

    hidden = empty(tokens, d, dtype=x.hidden_dtype)
    v = empty(tokens, low_rank, dtype=x.compute_dtype)
    logits = empty(tokens, x.num_experts)
    mean = empty(tokens if x.kind == "layer" else 0)
    rstd = empty(tokens)
    if not tokens:
        return hidden, v, logits, mean, rstd
    config = launch.config("norm_projection", x)
    column_blocks = triton.cdiv(low_rank + x.num_experts, config["BLOCK_N"])
    launch(
        norm_projection_kernel,
        (triton.cdiv(tokens, config["BLOCK_T"]) * column_blocks,),
        config,
        hidden_in=x.hidden_in,
        norm_weight=x.norm_weight.contiguous(),
        norm_bias=None if x.norm_bias is None else x.norm_bias.contiguous(),
        projection=projection,
        hidden=hidden,
        v=v,
        logits=logits,
        mean=mean,
        rstd=rstd,
        tokens=tokens,
        d=d,
        stride_in=row_stride(x.hidden_in),
        eps=x.eps,
        LOW_RANK=low_rank,
        NUM_EXPERTS=x.num_experts,
        CENTRED=x.kind == "layer",
        PRECISION=launch.arithmetic(x)["PRECISION"],
    )
    return hidden, v, logits, mean, rstd


def norm_backward(
    launch: Launcher, x: NormProjectInputs, gradient: Tensor, mean: Tensor, rstd: Tensor, need: dict[str, bool]
) -> dict[str, Tensor]:
    """Gradients of hidden_in [T, d], norm_weight and norm_bias [d] (float32), as needed, from that of h [T, d]."""
    tokens, d = x.shape
    config = launch.config("norm_backward", x)
    rows_per_program = triton.cdiv(tokens, config.pop("PROGRAMS"))
    programs = triton.cdiv(tokens, rows_per_program)

    def partial(needed: bool) -> Tensor | None:
        return torch.empty(programs, d, dtype=torch.float32, device=gradient.device) if needed else None

    d_hidden_in = None
    if need["hidden_in"]:
        d_hidden_in = torch.empty(tokens, d, dtype=x.hidden_in.dtype, device=gradient.device)
    partial_d_weight, partial_d_bias = partial(need["norm_weight"]), partial(need["norm_bias"])
    launch(
        norm_backward_kernel,
        (programs,),
        config,
        gradient=gradient,
        hidden_in=x.hidden_in,
        norm_weight=x.norm_weight.contiguous(),
        mean=mean,
        rstd=rstd,
        d_hidden_in=d_hidden_in,
        partial_d_weight=partial_d_weight,
        partial_d_bias=partial_d_bias,
        tokens=tokens,
        d=d,
        rows_per_program=rows_per_program,
        stride_gradient=row_stride(gradient),
        stride_in=row_stride(x.hidden_in),
        CENTRED=x.kind == "layer",
        BLOCK_D=triton.next_power_of_2(d),
    )
    grads = {
        "hidden_in": d_hidden_in,
        "norm_weight": None if partial_d_weight is None else partial_d_weight.sum(0),
        "norm_bias": None if partial_d_bias is None else partial_d_bias.sum(0),
    }
    return {name: grad for name, grad in grads.items() if grad is not None}


def norm_projection_reference(
    hidden_in: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, projection: Tensor, eps: float, kind: str
) -> tuple[Tensor, Tensor]:
    """h and [V | l] of the equations above, in the tensors' dtype."""
    if kind == "layer":
        hidden = F.layer_norm(hidden_in, hidden_in.shape[-1:], norm_weight, norm_bias, eps)
    else:
        hidden = F.rms_norm(hidden_in, hidden_in.shape[-1:], norm_weight, eps)
    return hidden, hidden @ projection.T


def norm_projection_cost(tokens: int, d: int, num_experts: int, rank: int, *, itemsize=2) -> Cost:
    """Reads x, M and W_r once, writes h, V and the logits; one product."""
    columns = num_experts * (rank + 1)
    written = itemsize * tokens * (d + num_experts * rank) + 4 * tokens * num_experts
    return Cost(itemsize * (tokens + columns) * d + written, 2 * tokens * d * columns)


def norm_backward_cost(tokens: int, d: int, *, itemsize=2) -> Cost:
    """Reads G and x, writes the gradient of x."""
    return Cost(3 * itemsize * tokens * d, 0)
