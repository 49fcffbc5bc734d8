r"""Router: logits, Gumbel-softmax, and the two token means of the balance loss, forward and backward.

.. math::
    \ell = h W_r^T + b,\quad p = \mathrm{softmax}((\ell + g) / \tau),\quad q = \mathrm{softmax}(\ell),\quad
    \mathrm{load} = \frac{1}{n}\sum_t m_t \hat p_t,\quad \mathrm{router\_prob} = \frac{1}{n}\sum_t m_t q_t

with the token mask m, n = max(sum m, 1) and the p that is used: p, or one-hot at its first largest entry. The noise
g = -log(-log u) comes from Philox at the counter t E + k and is never stored. Sums over tokens run in two stages,
blocks then their partial sums in a fixed order, without atomics: they are bit-equal from run to run.

Backward, for the gradients of p (partial sums over column blocks), load and router_prob:

.. math::
    \bar p_t = \sum_j \bar p_{jt} + \tfrac{m_t}{n} \overline{\mathrm{load}},\quad
    \bar\ell = \tfrac1\tau\, p \odot (\bar p - \langle \bar p, p\rangle)
        + q \odot (\bar q - \langle \bar q, q\rangle),\quad \bar q_t = \tfrac{m_t}{n} \overline{\mathrm{router\_prob}}

What m leaves out may hold NaN: it is chosen away, not multiplied by 0.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hycam_kernels.backends.triton.kernels.cost import Cost
from hycam_kernels.backends.triton.kernels.primitives import add_block_product
from hycam_kernels.backends.triton.launch import Launcher, padded_experts, row_stride
from hycam_kernels.inputs import ModulationInputs


@triton.jit
def gumbel_noise(seed, rows, experts, NUM_EXPERTS: tl.constexpr):
    """-log(-log u), u = tl.rand at the counter t E + k in 32 bits, 0 replaced by the smallest other draw."""
    counter = rows[:, None] * NUM_EXPERTS + experts[None, :]
    u = tl.maximum(tl.rand(tl.load(seed), counter), 4.6566127342e-10)
    return -tl.log(-tl.log(u))


@triton.jit
def softmax_rows(values, valid):
    """Softmax over the valid lanes of each row; the others get 0."""
    values = tl.where(valid, values, float("-inf"))
    exponentials = tl.exp(values - tl.max(values, 1)[:, None])
    return exponentials / tl.sum(exponentials, 1)[:, None]


@triton.jit
def router_kernel(
    hidden, weight, bias, gumbel, seed, token_mask, logits, probs, partial_sums,
    tokens, d, stride_hidden, stride_weight, tau,
    NUM_EXPERTS: tl.constexpr, PADDED_EXPERTS: tl.constexpr, HARD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Without hidden the logits are read, else written."""
    block = tl.program_id(0)
    rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, PADDED_EXPERTS)
    row_mask = rows < tokens
    expert_mask = experts < NUM_EXPERTS
    mask = row_mask[:, None] & expert_mask[None, :]

    offsets = rows.to(tl.int64)[:, None] * NUM_EXPERTS + experts[None, :]
    if hidden is None:
        logit = tl.load(logits + offsets, mask=mask, other=0.0)
    else:
        logit = tl.zeros((BLOCK_T, PADDED_EXPERTS), tl.float32)
        hidden_rows = hidden + rows.to(tl.int64)[:, None] * stride_hidden
        weight_rows = weight + experts.to(tl.int64)[:, None] * stride_weight
        for start in range(0, d, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            col_mask = (cols < d)[None, :]
            h = tl.load(hidden_rows + cols[None, :], mask=row_mask[:, None] & col_mask, other=0.0)
            w = tl.load(weight_rows + cols[None, :], mask=expert_mask[:, None] & col_mask, other=0.0)
            logit = add_block_product(logit, h, tl.trans(w), BLOCK_D)
        if bias is not None:
            logit += tl.load(bias + experts, mask=expert_mask, other=0.0).to(tl.float32)[None, :]
        tl.store(logits + offsets, logit, mask=mask)

    noisy = logit
    if gumbel is not None:
        noisy += tl.load(gumbel + offsets, mask=mask, other=0.0).to(tl.float32)
    if seed is not None:
        noisy += gumbel_noise(seed, rows, experts, NUM_EXPERTS)
    p = softmax_rows(noisy / tau, expert_mask[None, :])
    tl.store(probs + offsets, p, mask=mask)

    used = p
    if HARD:
        used = tl.where(tl.argmax(p, 1)[:, None] == experts[None, :], 1.0, 0.0) + (p - p)  # NaN stays NaN
    q = softmax_rows(logit, expert_mask[None, :])
    counted = row_mask
    if token_mask is not None:
        counted = tl.load(token_mask + rows, mask=row_mask, other=0) != 0
    partial = partial_sums + block.to(tl.int64) * 2 * NUM_EXPERTS
    tl.store(partial + experts, tl.sum(tl.where(counted[:, None], used, 0.0), 0), mask=expert_mask)
    tl.store(partial + NUM_EXPERTS + experts, tl.sum(tl.where(counted[:, None], q, 0.0), 0), mask=expert_mask)


@triton.jit
def token_mean_kernel(
    partial_sums, count, load, router_prob, blocks, tokens,
    NUM_EXPERTS: tl.constexpr, PADDED_EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Second stage: the blocks' partial sums [blocks, 2, E], BLOCK_T blocks at a time, over the counted tokens."""
    experts = tl.arange(0, PADDED_EXPERTS)
    mask = experts < NUM_EXPERTS
    p_sum = tl.zeros((PADDED_EXPERTS,), tl.float32)
    q_sum = tl.zeros((PADDED_EXPERTS,), tl.float32)
    for start in range(0, blocks, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        offsets = rows.to(tl.int64)[:, None] * 2 * NUM_EXPERTS + experts[None, :]
        valid = (rows < blocks)[:, None] & mask[None, :]
        p_sum += tl.sum(tl.load(partial_sums + offsets, mask=valid, other=0.0), 0)
        q_sum += tl.sum(tl.load(partial_sums + NUM_EXPERTS + offsets, mask=valid, other=0.0), 0)
    counted = tl.maximum(load_count(count, tokens), 1.0)
    tl.store(load + experts, p_sum / counted, mask=mask)
    tl.store(router_prob + experts, q_sum / counted, mask=mask)


@triton.jit
def load_count(count, tokens):
    """Tokens that count: all of them without a token mask."""
    if count is None:
        return tl.cast(tokens, tl.float32)
    else:
        return tl.load(count).to(tl.float32)


@triton.jit
def router_backward_kernel(
    partial_d_probs, probs, logits, grad_load, grad_router_prob, token_mask, count, d_logits, d_rows,
    tokens, partials, stride_rows, columns, tau,
    NUM_EXPERTS: tl.constexpr, PADDED_EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """d_rows [T, ``columns``], where given, gets the gradient too, and zeros in the columns beyond the experts."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, PADDED_EXPERTS)
    row_mask = rows < tokens
    expert_mask = experts < NUM_EXPERTS
    mask = row_mask[:, None] & expert_mask[None, :]
    offsets = rows.to(tl.int64)[:, None] * NUM_EXPERTS + experts[None, :]

    share = tl.where(row_mask, 1.0, 0.0)
    if token_mask is not None:
        share = tl.where(tl.load(token_mask + rows, mask=row_mask, other=0) != 0, 1.0, 0.0)
    share = share / tl.maximum(load_count(count, tokens), 1.0)

    d_p = tl.zeros((BLOCK_T, PADDED_EXPERTS), tl.float32)
    partial = partial_d_probs
    if partial_d_probs is not None:
        for _ in range(partials):
            d_p += tl.load(partial + offsets, mask=mask, other=0.0)
            partial += tl.cast(tokens, tl.int64) * NUM_EXPERTS
    if grad_load is not None:
        d_p += share[:, None] * tl.load(grad_load + experts, mask=expert_mask, other=0.0)[None, :]
    counted = (share > 0)[:, None]
    p = tl.load(probs + offsets, mask=mask, other=0.0)
    d_logit = p * (d_p - tl.sum(d_p * p, 1)[:, None]) / tau
    if partial_d_probs is None:
        d_logit = tl.where(counted, d_logit, 0.0)
    if grad_router_prob is not None:
        logit = tl.load(logits + offsets, mask=mask, other=0.0)
        q = softmax_rows(logit, expert_mask[None, :])
        d_q = share[:, None] * tl.load(grad_router_prob + experts, mask=expert_mask, other=0.0)[None, :]
        d_logit += tl.where(counted, q * (d_q - tl.sum(d_q * q, 1)[:, None]), 0.0)
    tl.store(d_logits + offsets, d_logit, mask=mask)
    if d_rows is not None:
        in_row = d_rows + rows.to(tl.int64)[:, None] * stride_rows
        tl.store(in_row + experts[None, :], d_logit.to(d_rows.dtype.element_ty), mask=mask)
        # fewer than 8, which `aligned_rows` adds
        beyond = NUM_EXPERTS + tl.arange(0, 8)[None, :]
        zero = tl.zeros((BLOCK_T, 8), tl.float32).to(d_rows.dtype.element_ty)
        tl.store(in_row + beyond, zero, mask=row_mask[:, None] & (beyond < columns))


def route(launch: Launcher, x: ModulationInputs, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [T, E], soft p [T, E], load [E] and router_prob [E], float32; hidden [T, d] in the compute dtype.

    Logits that were given are returned as they are.
    """
    tokens, d = hidden.shape

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    logits = empty(tokens, x.num_experts) if x.given_logits is None else x.given_logits
    probs = empty(tokens, x.num_experts)
    load, router_prob = empty(x.num_experts), empty(x.num_experts)
    if not x.num_experts:
        return logits, probs, load, router_prob
    weight = None if x.router_weight is None else x.router_weight.to(x.compute_dtype)
    factor = None if weight is None else hidden
    sizes = {"NUM_EXPERTS": x.num_experts, "PADDED_EXPERTS": padded_experts(x.num_experts)}
    config = launch.config("router", x)
    blocks = triton.cdiv(tokens, config["BLOCK_T"])
    partial_sums = empty(blocks, 2, x.num_experts)
    launch(
        router_kernel,
        (blocks,),
        config,
        hidden=factor,
        weight=weight,
        bias=x.router_bias,
        gumbel=None if x.gumbel is None else x.gumbel.contiguous(),
        seed=device_seed(x),
        token_mask=mask_bytes(x),
        logits=logits,
        probs=probs,
        partial_sums=partial_sums,
        tokens=tokens,
        d=d,
        stride_hidden=row_stride(factor),
        stride_weight=row_stride(weight),
        tau=x.tau,
        HARD=x.hard,
        **sizes,
    )
    launch(
        token_mean_kernel,
        (1,),
        launch.config("token_mean", x),
        partial_sums=partial_sums,
        count=_count(x),
        load=load,
        router_prob=router_prob,
        blocks=blocks,
        tokens=tokens,
        **sizes,
    )
    return logits, probs, load, router_prob


def route_backward(
    launch: Launcher,
    x: ModulationInputs,
    probs: Tensor,
    logits: Tensor,
    partial_d_probs: Tensor | None,
    grad_load: Tensor | None,
    grad_router_prob: Tensor | None,
    d_rows: Tensor | None = None,
) -> Tensor:
    """Gradient of the logits [T, E], float32, from that of p [partials, T, E] and those of the two token means.

    Where given, ``d_rows`` [T, E and fewer than 8 more] gets it too, in its dtype, and zeros beyond.
    """
    d_logits = torch.empty_like(logits)
    config = launch.config("router_backward", x)
    launch(
        router_backward_kernel,
        (triton.cdiv(x.hidden.shape[0], config["BLOCK_T"]),),
        config,
        partial_d_probs=partial_d_probs,
        probs=probs,
        logits=logits,
        grad_load=None if grad_load is None else grad_load.contiguous(),
        grad_router_prob=None if grad_router_prob is None else grad_router_prob.contiguous(),
        token_mask=mask_bytes(x),
        count=_count(x),
        d_logits=d_logits,
        d_rows=d_rows,
        stride_rows=row_stride(d_rows),
        columns=0 if d_rows is None else d_rows.shape[1],
        tokens=x.hidden.shape[0],
        partials=0 if partial_d_probs is None else partial_d_probs.shape[0],
        tau=x.tau,
        NUM_EXPERTS=x.num_experts,
        PADDED_EXPERTS=padded_experts(x.num_experts),
    )
    return d_logits


def device_seed(x: ModulationInputs) -> Tensor | None:
    """The seed where a kernel can read it. A CPU seed is filled in, not copied: a copy can't join a CUDA graph."""
    if x.seed is None or x.seed.device == x.hidden.device:
        return x.seed
    return torch.full((), int(x.seed), dtype=torch.int64, device=x.hidden.device)


def mask_bytes(x: ModulationInputs) -> Tensor | None:
    return None if x.token_mask is None else x.token_mask.contiguous().view(torch.uint8)


def _count(x: ModulationInputs) -> Tensor | None:
    return None if x.token_mask is None else x.token_mask.sum()


def route_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, noise: Tensor | None, tau: float, hard: bool, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward equations in hidden's dtype: logits, p, load and router_prob."""
    logits = F.linear(hidden, weight, bias)
    p = torch.softmax((logits if noise is None else logits + noise) / tau, -1)
    used = F.one_hot(p.argmax(-1), p.shape[-1]).to(p.dtype) if hard else p
    share = mask.to(p.dtype) / mask.sum().clamp_min(1)
    return logits, p, share @ used, share @ torch.softmax(logits, -1)


def route_backward_reference(
    d_probs: Tensor,
    probs: Tensor,
    logits: Tensor,
    grad_load: Tensor,
    grad_router_prob: Tensor,
    mask: Tensor,
    tau: float,
) -> Tensor:
    """The backward equation in the tensors' dtype."""
    share = (mask.to(probs.dtype) / mask.sum().clamp_min(1))[:, None]
    d_p = d_probs + share * grad_load
    q, d_q = torch.softmax(logits, -1), share * grad_router_prob
    through_p = probs * (d_p - (d_p * probs).sum(-1, keepdim=True)) / tau
    return through_p + q * (d_q - (d_q * q).sum(-1, keepdim=True))


def route_cost(tokens: int, d: int, num_experts: int, *, itemsize=2) -> Cost:
    """Reads h and W_r once, writes logits and p; a product of T d E."""
    return Cost(itemsize * (tokens + num_experts) * d + 8 * tokens * num_experts, 2 * tokens * d * num_experts)


def token_mean_cost(blocks: int, num_experts: int) -> Cost:
    """Reads the blocks' partial sums, writes the two means."""
    return Cost(8 * num_experts * (blocks + 1), 0)


def route_backward_cost(tokens: int, num_experts: int, partials: int) -> Cost:
    """Reads the partial gradients, p and logits, writes the logits' gradient."""
    return Cost(4 * tokens * num_experts * (partials + 3), 0)
