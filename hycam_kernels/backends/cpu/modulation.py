"""The op on a CPU with its element-wise terms in native code: the torch backend's results in fewer passes.

Matrix products are torch's, and what is kept for the backward is what the torch backend keeps. The experts' outputs
[E, T, d] are made by blocks of rows that the cache holds, in one batched product, and one native pass takes such a
block to h_out; in the backward one pass takes it to the gradients of h_att, of S, of p and of the products themselves,
in their place. float64 products are left to the torch backend.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hycam_kernels.backends.cpu import library, passes
from hycam_kernels.backends.torch.products import (
    Sum,
    chosen_product,
    folded_product,
    kept,
    shared_backward,
    shared_product,
    used_probs,
)
from hycam_kernels.folding import fold, has_bias, unfold_grads
from hycam_kernels.inputs import DIFFERENTIABLE, ModulationInputs, Saved, finish

# of one column of a block of rows: in fewer rows the products are slow, more leave the cache
_BLOCK_COLUMN_BYTES = 1024


def refusal(x: ModulationInputs) -> str | None:
    """Why the native passes can't run the call; None where they can."""
    if x.hidden.device.type != "cpu":
        return f"the native passes are for the CPU, the tensors are on {x.hidden.device}"
    if x.compute_dtype not in passes.DTYPES:
        return f"the native passes take float32, bfloat16 and float16, the products are {x.compute_dtype}"
    return library.refusal()


def explain(x: ModulationInputs) -> str:
    """What runs the torch backend's element-wise passes of a call on a CPU, and why; nothing of other devices."""
    if x.hidden.device.type != "cpu":
        return ""
    refused = refusal(x)
    if refused:
        return f"; torch runs the element-wise passes: {refused}"
    return f"; native code for {library.vector_set().upper()} runs the element-wise passes"


def draw_noise(x: ModulationInputs) -> Tensor | None:
    """The Gumbel noise of a call that the native passes can run, [T, E] float32; None without noise."""
    if x.seed is not None:
        return passes.gumbel_noise(int(x.seed), x.shape[0], x.num_experts)
    return None if x.gumbel is None else x.gumbel.to(torch.float32).contiguous()


def forward(x: ModulationInputs) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """h_out [T, d], load [E], router_prob [E] and what the backward needs."""
    hidden = _rows(x.hidden.to(x.compute_dtype))
    s = shared_product(x, hidden)
    v = folded_product(x, hidden)
    logits, probs, p, load, router_prob = _route(x, hidden)

    attn_output, residual = _rows(x.attn_output), _rows(x.residual)
    out = _empty_like(attn_output)
    if x.hard and x.num_experts:
        # only the output of the expert that a token takes, with its bias
        chosen = chosen_product(x, hidden, v, p)[None]
        passes.modulate(s, chosen, p.sum(-1, keepdim=True), None, x.scale, attn_output, residual, out)
    else:
        shift = _shift(x)
        for rows, products in _expert_products(x, hidden, v):
            passes.modulate(
                _of(s, rows), products, _of(p, rows), shift, x.scale, _of(attn_output, rows), _of(residual, rows),
                _of(out, rows),
            )  # fmt: skip
    return out.to(x.attn_output.dtype), load, router_prob, kept(x, s, v, probs, logits)


def backward(
    grad_out: Tensor | None,
    grad_load: Tensor | None,
    grad_router_prob: Tensor | None,
    x: ModulationInputs,
    saved: Saved,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the tensors in `DIFFERENTIABLE`, each in its tensor's dtype; 0 elements where ``needs`` is false."""
    need = dict(zip(DIFFERENTIABLE, needs, strict=True))
    grads: dict[str, Tensor] = {}
    hidden = _rows(x.hidden.to(x.compute_dtype))
    d_hidden = Sum()
    d_probs = d_v = None
    # the logits' gradient stands beside V's: one product takes both to h
    joined = need["hidden"] and x.router_weight is not None and x.lora_a is not None and grad_out is not None
    if grad_out is not None:
        s = saved.s if saved.s.numel() else shared_product(x, hidden)
        v = saved.v if saved.v.numel() else folded_product(x, hidden)
        d_s = None if s is None else torch.empty_like(s)
        d_v = None if v is None else v.new_empty(v.shape[0], v.shape[1] + x.num_experts * joined)
        d_probs = torch.empty_like(saved.probs)
        for name in ("residual", "attn_output"):
            if need[name]:
                grads[name] = _empty_like(_rows(getattr(x, name)))
        _terms_backward(x, hidden, s, v, saved.probs, _rows(grad_out), d_s, d_v, d_probs, need, grads, d_hidden)
        del s, v
        if d_s is not None:
            if need["shared_bias"]:
                grads["shared_bias"] = passes.sum_tokens(d_s)[0]
            shared_backward(x, hidden, d_s, need, grads, d_hidden)
        del d_s
    if x.num_experts:
        _route_backward(x, hidden, saved, d_probs, d_v, joined, grad_load, grad_router_prob, need, grads, d_hidden)
    if d_v is not None:
        _folded_backward(x, hidden, d_v, joined, need, grads, d_hidden)
    if need["hidden"] and d_hidden.value is not None:
        grads["hidden"] = d_hidden.value
    return [finish(x, name, grads.get(name), needed) for name, needed in need.items()]


def _terms_backward(
    x: ModulationInputs,
    hidden: Tensor,
    s: Tensor | None,
    v: Tensor | None,
    probs: Tensor,
    grad_out: Tensor,
    d_s: Tensor | None,
    d_v: Tensor | None,
    d_probs: Tensor,
    need: dict[str, bool],
    grads: dict[str, Tensor],
    d_hidden: Sum,
) -> None:
    """From h_out's gradient to those of S, V, p, h_att and h_in, and of what makes the experts' products."""
    p = used_probs(x, probs)
    shift = _shift(x)
    attn_output, residual = _rows(x.attn_output), _rows(x.residual)
    of_weight = None
    if x.num_experts and need["expert_weight" if v is None else "lora_b"]:
        of_weight = _WeightGradient()
    of_bias = None
    if need["lora_b_bias"]:
        of_bias = grads["lora_b_bias"] = hidden.new_zeros(x.num_experts, x.shape[1], dtype=torch.float32)
    if x.expert_weight is not None and need["hidden"]:
        d_hidden.value = _empty_like(hidden)
    for rows, products in _expert_products(x, hidden, v):
        passes.modulate_backward(
            _of(s, rows), products, _of(p, rows), shift, x.scale, _of(grad_out, rows), _of(attn_output, rows),
            _of(residual, rows), _of(d_s, rows), _of(d_probs, rows), _of(grads.get("attn_output"), rows),
            _of(grads.get("residual"), rows),
        )  # fmt: skip
        if not x.num_experts:
            continue
        if of_bias is not None:
            for k in range(x.num_experts):
                passes.sum_tokens(products[k], into=of_bias[k : k + 1])
        inputs, weight = _batched_operands(x, hidden, v)
        if of_weight is not None:
            of_weight.add(products, _of(inputs, rows, 1))
        if d_v is not None:
            torch.bmm(products, weight, out=_of(_by_expert(x, d_v), rows, 1))
        elif d_hidden.value is not None:
            of_rows = _of(d_hidden.value, rows)
            torch.mm(products[0], weight[0], out=of_rows)
            for k in range(1, x.num_experts):
                of_rows.addmm_(products[k], weight[k])
    if of_weight is not None and of_weight.value is not None:
        grads["expert_weight" if v is None else "lora_b"] = of_weight.value


class _WeightGradient:
    """sum_t d_product_t input_t^T of each expert over blocks of rows, in the sum dtype from the second block on."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def add(self, d_products: Tensor, inputs: Tensor) -> None:
        product = torch.bmm(d_products.mT, inputs)
        self.value = product if self.value is None else self.value.to(torch.float32).add_(product)


# rows from one to another; None for all of them
_Range = tuple[int, int] | None


def _expert_products(x: ModulationInputs, hidden: Tensor, v: Tensor | None) -> Iterator[tuple[_Range, Tensor]]:
    """Rows and, in the compute dtype, V_k B_k^T or h W_k^T of each expert k for them: [E, rows, d], made block by block
    in the same memory. Without experts: all rows and an empty tensor."""
    tokens, d = x.shape
    if not x.num_experts:
        yield None, hidden.new_empty(0, tokens, d)
        return
    inputs, weight = _batched_operands(x, hidden, v)
    # of equal size: a short last block would cost as many calls as a whole one
    blocks = max(-(-tokens * hidden.element_size() // _BLOCK_COLUMN_BYTES), 1)
    size = max(-(-tokens // blocks), 1)
    memory = hidden.new_empty(x.num_experts, size, d)
    for start in range(0, tokens, size):
        rows = None if size == tokens else (start, min(start + size, tokens))
        products = memory if rows is None else memory[:, : rows[1] - start]
        torch.bmm(_of(inputs, rows, 1), weight.mT, out=products)
        yield rows, products


def _batched_operands(x: ModulationInputs, hidden: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
    """(V [E, T, r], B [E, d, r]) or (h [E, T, d], W [E, d, d]), in the compute dtype."""
    if v is not None and x.lora_b is not None:
        return _by_expert(x, v), x.lora_b.to(x.compute_dtype)
    assert x.expert_weight is not None
    return hidden.expand(x.num_experts, *hidden.shape), x.expert_weight.to(x.compute_dtype)


def _by_expert(x: ModulationInputs, v: Tensor) -> Tensor:
    """Its first E * r columns as [E, T, r]."""
    return v[:, : x.num_experts * x.rank].unflatten(1, (x.num_experts, x.rank)).transpose(0, 1)


def _folded_backward(
    x: ModulationInputs,
    hidden: Tensor,
    d_v: Tensor,
    joined: bool,
    need: dict[str, bool],
    grads: dict[str, Tensor],
    d_hidden: Sum,
) -> None:
    """From the gradient of V, with the logits' beside it where ``joined``, to those of h, A, N and their biases."""
    if x.given_v is not None:
        grads["given_v"] = d_v
        return
    if need["hidden"]:
        weight = fold(x)[0]
        if joined:
            assert x.router_weight is not None
            weight = torch.cat((weight, x.router_weight.to(x.compute_dtype)))
        d_hidden.add_product(d_v, weight)
    if any(need[name] for name in ("lora_a", "lora_n", "lora_a_bias", "lora_n_bias")):
        d_v = d_v[:, : x.num_experts * x.rank]
        d_bias = passes.sum_tokens(d_v) if has_bias(x) else None
        grads |= unfold_grads(x, d_v.T @ hidden, d_bias, need)


def _route(x: ModulationInputs, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logits, p, p as it is used [T, E], load and router_prob [E]."""
    if not x.num_experts:
        logits, probs, load, router_prob = (
            hidden.new_empty(shape, dtype=torch.float32) for shape in ((hidden.shape[0], 0),) * 2 + ((0,),) * 2
        )
        return logits, probs, probs, load, router_prob
    weight = bias = None
    if x.given_logits is None:
        assert x.router_weight is not None
        weight = x.router_weight.to(x.compute_dtype).to(torch.float32).contiguous()
        bias = None if x.router_bias is None else x.router_bias.to(torch.float32).contiguous()
    return passes.route(hidden, weight, bias, x.given_logits, draw_noise(x), x.tau, _mask(x), x.hard)


def _route_backward(
    x: ModulationInputs,
    hidden: Tensor,
    saved: Saved,
    d_probs: Tensor | None,
    d_v: Tensor | None,
    joined: bool,
    grad_load: Tensor | None,
    grad_router_prob: Tensor | None,
    need: dict[str, bool],
    grads: dict[str, Tensor],
    d_hidden: Sum,
) -> None:
    """From the gradients of p and of both means to those of the logits and of what makes them."""
    narrow = d_v[:, -x.num_experts :] if joined and d_v is not None else None
    mask = _mask(x)
    d_logits = passes.route_backward(
        saved.probs, saved.logits if x.given_logits is None else x.given_logits, d_probs, _contiguous(grad_load),
        _contiguous(grad_router_prob), x.tau, mask, narrow,
    )  # fmt: skip
    # a token that doesn't count may hold NaN: where the output's gradient is absent, nothing of it is read
    counted = mask if d_probs is None else None
    if need["given_logits"]:
        grads["given_logits"] = d_logits
    if need["router_bias"]:
        grads["router_bias"] = passes.sum_tokens(d_logits)[0]
    if need["router_weight"]:
        grads["router_weight"] = passes.sum_tokens(hidden, d_logits, counted)
    if need["hidden"] and x.router_weight is not None and not joined:
        d_hidden.add_product(d_logits.to(x.compute_dtype), x.router_weight.to(x.compute_dtype))


def _shift(x: ModulationInputs) -> Tensor | None:
    """scale * b_k [E, d] in float32."""
    return None if x.lora_b_bias is None else (x.lora_b_bias.to(torch.float32) * x.scale).contiguous()


def _mask(x: ModulationInputs) -> Tensor | None:
    return None if x.token_mask is None else x.token_mask.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _rows(tensor):
    """A matrix as the passes read it, itself where it can be: contiguous rows, float32 for float64; None of None."""
    if tensor is None:
        return None
    if tensor.dtype not in passes.DTYPES:
        tensor = tensor.to(torch.float32)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _empty_like(rows: Tensor) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


def _of(tensor, rows: _Range, dim: int = 0):
    """The rows of a tensor; None of None."""
    return tensor if tensor is None or rows is None else tensor.narrow(dim, rows[0], rows[1] - rows[0])
