"""The native passes as functions of tensors on the CPU, on `torch.get_num_threads` threads.

Matrices have contiguous rows at any stride; what is [T, E], [E, d] or [E] is contiguous and float32. Nothing is checked
here. A pass gives the same bits for any number of threads.

Raises:
    library.RefusedError: the native passes don't run in this process.
"""

import torch
from torch import Tensor

from hycam_kernels.backends.cpu.library import Rows, function

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ABSENT = Rows(None, 0, 0)
_TOKENS_A_SUM = 64  # as kTokens in src/routing.cpp
MOST_FEW_TOKENS = 4  # that src/few_tokens.cpp takes


def few_tokens(
    hidden: Tensor,
    attn_output: Tensor,
    residual: Tensor | None,
    shared: Tensor | None,
    a: Tensor | None,
    n: Tensor | None,
    b: Tensor | None,
    router: Tensor | None,
    shared_bias: Tensor | None,
    a_bias: Tensor | None,
    n_bias: Tensor | None,
    b_bias: Tensor | None,
    router_bias: Tensor | None,
    noise: Tensor | None,
    tau: float,
    scale: float,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole op for at most 4 tokens: h_out [T, d] in attn_output's dtype, p as it is used (one-hot where ``hard``)
    and logits [T, E].

    Args:
        hidden, attn_output, residual: [T, d].
        shared: [d, d]; it, the other weights and the biases are contiguous, the biases and ``noise`` [T, E] float32.
        a, n, b: [E, r, d], [E, r, r] and [E, d, r]; or b alone, [E, d, d].
        router: [E, d].
    """
    tokens, d = hidden.shape
    count = 0 if router is None else router.shape[0]
    rank = 0 if n is None else n.shape[1]
    probs, logits = torch.empty(2, tokens, count, dtype=torch.float32)
    out = torch.empty(tokens, d, dtype=attn_output.dtype)
    scratch = torch.empty(tokens * (d + 2 * count * rank), dtype=torch.float32)
    function("few_tokens")(
        tokens, d, count, rank, _rows(hidden), _rows(attn_output), _rows(residual), _rows(out), *_weight(shared),
        *_weight(a), *_weight(n), *_weight(b), *_weight(router), _pointer(shared_bias), _pointer(a_bias),
        _pointer(n_bias), _pointer(b_bias), _pointer(router_bias), _pointer(noise), tau, scale, hard,
        logits.data_ptr(), probs.data_ptr(), scratch.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out, probs, logits


def modulate(
    s: Tensor | None,
    products: Tensor,
    p: Tensor,
    shift: Tensor | None,
    scale: float,
    attn_output: Tensor,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    """out = h_att + stream * (SiLU(S) + sum_k p_k SiLU(scale * product_k + shift_k)).

    Args:
        s: [T, d], in the products' dtype.
        products: [E, T, d]; E = 0 for no experts.
        p: [T, E].
        shift: [E, d].
        attn_output, residual, out: [T, d].
    """
    count, tokens, d = products.shape
    function("modulate")(
        tokens, d, count, DTYPES[products.dtype], *_matrix(s), products.data_ptr(), products.stride(0),
        products.stride(1), p.data_ptr(), _pointer(shift), scale, _rows(attn_output), _rows(residual), _rows(out),
        torch.get_num_threads(),
    )  # fmt: skip


def modulate_backward(
    s: Tensor | None,
    products: Tensor,
    p: Tensor,
    shift: Tensor | None,
    scale: float,
    grad_out: Tensor,
    attn_output: Tensor,
    residual: Tensor | None,
    d_s: Tensor | None,
    d_p: Tensor,
    d_attn_output: Tensor | None,
    d_residual: Tensor | None,
) -> None:
    """Writes the gradients of S, p, h_att and h_in from that of h_out, and those of the products over the products."""
    count, tokens, d = products.shape
    function("modulate_backward")(
        tokens, d, count, DTYPES[products.dtype], *_matrix(s), *_matrix(d_s), products.data_ptr(), products.stride(0),
        products.stride(1), p.data_ptr(), d_p.data_ptr(), _pointer(shift), scale, _rows(grad_out), _rows(attn_output),
        _rows(residual), _rows(d_attn_output), _rows(d_residual), torch.get_num_threads(),
    )  # fmt: skip


def route(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    given_logits: Tensor | None,
    noise: Tensor | None,
    tau: float,
    token_mask: Tensor | None,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits, p, p as it is used (one-hot where ``hard``) [T, E], load and router_prob [E].

    Args:
        hidden: [T, d].
        weight: [E, d] with bias [E], or given_logits [T, E] instead.
        noise: [T, E].
        token_mask: [T] bool, contiguous.
    """
    tokens = hidden.shape[0]
    of_count = weight if given_logits is None else given_logits.T
    assert of_count is not None
    count = of_count.shape[0]
    logits = hidden.new_empty(tokens, count, dtype=torch.float32) if given_logits is None else given_logits
    probs = torch.empty_like(logits)
    used = torch.empty_like(logits) if hard else probs
    sums = hidden.new_empty((-(-tokens // _TOKENS_A_SUM), 2, count), dtype=torch.float64)
    load, router_prob = (hidden.new_empty(count, dtype=torch.float32) for _ in range(2))
    function("route")(
        tokens, hidden.shape[1], count, _rows(hidden), _pointer(weight), _pointer(bias), _pointer(noise), tau,
        _pointer(token_mask), logits.data_ptr(), probs.data_ptr(), used.data_ptr() if hard else None, sums.data_ptr(),
        load.data_ptr(), router_prob.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return logits, probs, used, load, router_prob


def route_backward(
    probs: Tensor,
    logits: Tensor,
    d_probs: Tensor | None,
    grad_load: Tensor | None,
    grad_router_prob: Tensor | None,
    tau: float,
    token_mask: Tensor | None,
    narrow: Tensor | None,
) -> Tensor:
    """Gradient of the logits [T, E] through p and both means, also written to ``narrow`` [T, E] in its dtype.

    Without ``d_probs`` that of a token that doesn't count is 0, whatever the token holds.
    """
    d_logits = torch.empty_like(probs)
    function("route_backward")(
        *probs.shape, probs.data_ptr(), logits.data_ptr(), _pointer(d_probs), _pointer(grad_load),
        _pointer(grad_router_prob), tau, _pointer(token_mask), d_logits.data_ptr(), _rows(narrow),
        torch.get_num_threads(),
    )  # fmt: skip
    return d_logits


def sum_tokens(
    values: Tensor, weight: Tensor | None = None, token_mask: Tensor | None = None, into: Tensor | None = None
) -> Tensor:
    """sum_t w_te x_tj over the counted tokens, [E, d] in float32; w is 1 and E is 1 by default.

    Args:
        values: x [T, d].
        weight: w [T, E].
        into: [E, d] to which the sum is added, and which is returned.
    """
    tokens, d = values.shape
    count = 1 if weight is None else weight.shape[1]
    out = values.new_empty(count, d, dtype=torch.float32) if into is None else into
    function("sum_tokens")(
        tokens, d, count, _pointer(weight), _rows(values), _pointer(token_mask), out.data_ptr(), into is not None,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def gumbel_noise(seed: int, num_tokens: int, num_experts: int) -> Tensor:
    """`hycam_kernels.philox.gumbel_noise` of a seed that fits int64, bit for bit: [T, E]."""
    out = torch.empty(num_tokens, num_experts, dtype=torch.float32, device="cpu")
    function("uniforms")(out.numel(), seed, out.data_ptr(), torch.get_num_threads())
    # torch's logarithms, as the definition's
    return out.log_().neg_().log_().neg_()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _matrix(tensor: Tensor | None) -> tuple[int | None, int]:
    """Pointer and row stride."""
    return (None, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def _weight(tensor: Tensor | None) -> tuple[int | None, int]:
    """Pointer and dtype."""
    return (None, 0) if tensor is None else (tensor.data_ptr(), DTYPES[tensor.dtype])


def _rows(tensor: Tensor | None) -> Rows:
    return _ABSENT if tensor is None else Rows(tensor.data_ptr(), tensor.stride(0), DTYPES[tensor.dtype])
