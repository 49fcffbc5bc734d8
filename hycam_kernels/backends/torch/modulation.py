"""The op in PyTorch with a hand-written backward: what CPU users run, and the fallback of the fused kernels.

Matrix products run in the compute dtype; element-wise terms, softmax and sums in the sum dtype. N is folded into A in
weight space, ``M_k = N_k A_k``, so that one product ``V = h M^T`` serves all experts. The forward keeps S and V only;
expert outputs Z_k = scale * (V_k B_k^T + b_k) are made again in the backward, one expert at a time.

Products take whole tensors, element-wise terms go through them by blocks of rows that a CPU's cache holds from one term
to the next (`_row_blocks`): beside the results there are two [T, d] tensors in the sum dtype and one or two in the
compute dtype at a time. No term crosses rows, so a result doesn't depend on the block size. Under hard routing on a CPU
the forward makes only the output of the expert that each token takes.
"""

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hycam_kernels.backends.torch.products import (
    Sum,
    chosen_product,
    expert_operands,
    folded_product,
    kept,
    shared_backward,
    shared_product,
    used_probs,
)
from hycam_kernels.folding import fold, unfold_grads
from hycam_kernels.inputs import DIFFERENTIABLE, ModulationInputs, Saved, finish
from hycam_kernels.philox import gumbel_noise

# of a row block, for each of a CPU's threads: half a dozen float32 blocks of it fit a core's cache
_BLOCK_ELEMENTS = 1 << 17


def forward(x: ModulationInputs) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """h_out [T, d], load [E], router_prob [E] and what the backward needs."""
    hidden = x.hidden.to(x.compute_dtype)
    s = shared_product(x, hidden)
    v = folded_product(x, hidden)
    logits, probs = _route(x, hidden)
    p = used_probs(x, probs)

    fusion = hidden.new_zeros(hidden.shape, dtype=x.sum_dtype) if s is None else F.silu(s.to(x.sum_dtype))
    for product, shift, weight in _forward_terms(x, hidden, v, p):
        for fusion_rows, product_rows, weight_rows in _row_blocks(x, fusion, product, weight):
            fusion_rows.addcmul_(weight_rows, F.silu(_expert_output(x, product_rows, shift)))
    out = torch.empty_like(x.attn_output, memory_format=torch.contiguous_format)
    for out_rows, fusion_rows, attn_rows, residual_rows in _row_blocks(x, out, fusion, x.attn_output, x.residual):
        stream = _stream(x, attn_rows, residual_rows)
        out_rows.copy_(fusion_rows.mul_(stream).add_(attn_rows))

    load = _token_mean(x, p)
    router_prob = _token_mean(x, torch.softmax(logits, dim=-1))
    return out, load, router_prob, kept(x, s, v, probs, logits)


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
    hidden = x.hidden.to(x.compute_dtype)
    d_logits = None
    d_hidden = Sum()
    d_probs = torch.zeros_like(saved.probs)

    if grad_out is not None:
        s = saved.s if saved.s.numel() else shared_product(x, hidden)
        v = saved.v if saved.v.numel() else folded_product(x, hidden)
        p = used_probs(x, saved.probs)
        # h_out = h_att + stream * A_fusion
        d_fusion, fusion = (hidden.new_empty(hidden.shape, dtype=x.sum_dtype) for _ in range(2))
        d_s = None if s is None else torch.empty_like(s)
        for d_rows, fusion_rows, d_s_rows, s_rows, grad_rows, attn_rows, residual_rows in _row_blocks(
            x, d_fusion, fusion, d_s, s, grad_out, x.attn_output, x.residual
        ):
            torch.mul(_stream(x, attn_rows, residual_rows), grad_rows.to(x.sum_dtype), out=d_rows)
            if s_rows is None:
                fusion_rows.zero_()
            else:
                s_rows = s_rows.to(x.sum_dtype)
                torch.ops.aten.silu.out(s_rows, out=fusion_rows)
                d_s_rows.copy_(torch.ops.aten.silu_backward(d_rows, s_rows))
        if d_s is not None:
            if need["shared_bias"]:
                grads["shared_bias"] = d_s.sum(0)
            shared_backward(x, hidden, d_s, need, grads, d_hidden)
        del s, d_s

        d_v = None if v is None else torch.empty_like(v)
        per_expert: dict[str, list[Tensor]] = {"lora_b": [], "lora_b_bias": [], "expert_weight": []}
        for k, product, shift in _expert_products(x, hidden, v):
            d_z = _activation_backward(x, product, shift, p[:, k : k + 1], d_fusion, fusion, d_probs[:, k])
            if need["lora_b_bias"]:
                per_expert["lora_b_bias"].append(d_z.sum(0))
            if v is not None and d_v is not None and x.lora_b is not None:
                of_k = slice(k * x.rank, (k + 1) * x.rank)
                d_v[:, of_k] = d_z @ x.lora_b[k].to(x.compute_dtype)
                if need["lora_b"]:
                    per_expert["lora_b"].append(d_z.T @ v[:, of_k])
            elif x.expert_weight is not None:
                if need["expert_weight"]:
                    per_expert["expert_weight"].append(d_z.T @ hidden)
                if need["hidden"]:
                    d_hidden.add_product(d_z, x.expert_weight[k].to(x.compute_dtype))
        grads |= {name: torch.stack(parts) for name, parts in per_expert.items() if parts}
        if d_v is not None and x.given_v is not None:
            grads["given_v"] = d_v
        elif d_v is not None:
            _folded_backward(x, hidden, d_v, need, grads, d_hidden)

        for name in ("residual", "attn_output"):
            if need[name]:
                grads[name] = torch.empty_like(getattr(x, name), memory_format=torch.contiguous_format)
        for fusion_rows, grad_rows, d_residual_rows, d_attn_rows in _row_blocks(
            x, fusion, grad_out, grads.get("residual"), grads.get("attn_output")
        ):
            d_stream = fusion_rows.mul_(grad_rows)
            if d_residual_rows is not None:
                d_residual_rows.copy_(d_stream)
            if d_attn_rows is not None:
                d_attn_rows.copy_(d_stream.add_(grad_rows))

    if x.num_experts:
        d_logits = _route_backward(x, saved, d_probs, grad_load, grad_router_prob)
        if grad_out is None and x.token_mask is not None:
            # chosen, not multiplied by 0: a token that doesn't count may hold NaN
            d_logits, hidden = (rows.where(x.token_mask[:, None], 0) for rows in (d_logits, hidden))
        if need["given_logits"]:
            grads["given_logits"] = d_logits
        if need["router_bias"]:
            grads["router_bias"] = d_logits.sum(0)
        if need["router_weight"]:
            # a token's share of the balance loss is below float16's smallest number
            grads["router_weight"] = d_logits.T @ hidden.to(x.sum_dtype)
        if need["hidden"] and x.router_weight is not None:
            d_hidden.add_product(d_logits.to(x.compute_dtype), x.router_weight.to(x.compute_dtype))
    if need["hidden"] and d_hidden.value is not None:
        grads["hidden"] = d_hidden.value

    return [finish(x, name, grads.get(name), needed) for name, needed in need.items()]


def _row_blocks(x: ModulationInputs, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Views of some rows of each tensor of T rows, None for None, block by block: all rows at once but on a CPU."""
    tokens, d = x.shape
    size = tokens
    if x.hidden.device.type == "cpu":
        size = max(_BLOCK_ELEMENTS * torch.get_num_threads() // d, 1)
    if size >= tokens:
        return iter([tensors])
    return zip(*(repeat(None) if tensor is None else tensor.split(size) for tensor in tensors), strict=False)


def _stream(x: ModulationInputs, attn_output: Tensor, residual: Tensor | None) -> Tensor:
    """What A_fusion multiplies, in the sum dtype: h_att, or the residual stream h_in + h_att."""
    attn_output = attn_output.to(x.sum_dtype)
    return attn_output if residual is None else attn_output + residual


def _expert_output(x: ModulationInputs, product: Tensor, shift: Tensor | None) -> Tensor:
    """Z_k = scale * product + shift, in the sum dtype."""
    product = product.to(x.sum_dtype)
    if shift is not None:
        return torch.add(shift, product, alpha=x.scale)
    return product if x.scale == 1 else product * x.scale


def _activation_backward(
    x: ModulationInputs,
    product: Tensor,
    shift: Tensor | None,
    p: Tensor,
    d_fusion: Tensor,
    fusion: Tensor,
    d_p: Tensor,
) -> Tensor:
    """Gradient of an expert's product [T, d], written over it.

    Adds the expert's share of A_fusion to ``fusion`` [T, d] and writes the gradient of its p [T, 1] to ``d_p`` [T].
    With a = SiLU(z), ``g SiLU'(z) = g (a + sigmoid(z) (1 - a))``, which lies at sigmoid(z) between g a and g.
    """
    scaled_p = p * x.scale
    for product_rows, p_rows, scaled_p_rows, d_rows, fusion_rows, d_p_rows in _row_blocks(
        x, product, p, scaled_p, d_fusion, fusion, d_p
    ):
        z = _expert_output(x, product_rows, shift)
        gate = torch.sigmoid(z)
        activation = z * gate
        fusion_rows.addcmul_(p_rows, activation)
        d_z = activation.mul_(d_rows)
        torch.sum(d_z, -1, out=d_p_rows)
        product_rows.copy_(d_z.lerp_(d_rows, gate).mul_(scaled_p_rows))
    return product


def _folded_backward(
    x: ModulationInputs,
    hidden: Tensor,
    d_v: Tensor,
    need: dict[str, bool],
    grads: dict[str, Tensor],
    d_hidden: Sum,
) -> None:
    if need["hidden"]:
        d_hidden.add_product(d_v, fold(x)[0])
    if not any(need[name] for name in ("lora_a", "lora_n", "lora_a_bias", "lora_n_bias")):
        return
    grads |= unfold_grads(x, d_v.T @ hidden, d_v.sum(0, dtype=x.sum_dtype), need)


def _forward_terms(
    x: ModulationInputs, hidden: Tensor, v: Tensor | None, p: Tensor
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """(product [T, d], shift as `_expert_products` gives them, weight [T, 1]) of each term of sum_k p_k SiLU(z_k)."""
    # a GPU would wait for the host to learn how many tokens each expert gets
    if x.hard and x.num_experts and hidden.device.type == "cpu":
        yield chosen_product(x, hidden, v, p), None, p.sum(-1, keepdim=True)
        return
    for k, product, shift in _expert_products(x, hidden, v):
        yield product, shift, p[:, k : k + 1]


def _expert_products(
    x: ModulationInputs, hidden: Tensor, v: Tensor | None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(k, V_k B_k^T or h W_k^T [T, d] in the compute dtype, scale * b_k [d] in the sum dtype or None)."""
    for k in range(x.num_experts):
        shift = None if x.lora_b_bias is None else x.lora_b_bias[k].to(x.sum_dtype) * x.scale
        yield k, F.linear(*expert_operands(x, hidden, v, k)), shift


def _route(x: ModulationInputs, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """logits and p = softmax((logits + g) / tau), [T, E] in the sum dtype."""
    if x.given_logits is not None:
        logits = x.given_logits
    elif x.router_weight is not None:
        weight = x.router_weight.to(x.compute_dtype).to(x.sum_dtype)
        bias = None if x.router_bias is None else x.router_bias.to(x.sum_dtype)
        logits = F.linear(hidden.to(x.sum_dtype), weight, bias)
    else:
        empty = hidden.new_empty(hidden.shape[0], 0, dtype=x.sum_dtype)
        return empty, empty.clone()
    noise = x.gumbel
    if x.seed is not None:
        noise = gumbel_noise(x.seed, logits.shape[0], x.num_experts, logits.device)
    noisy = logits if noise is None else logits + noise.to(x.sum_dtype)
    return logits, torch.softmax(noisy / x.tau, dim=-1)


def _token_mean(x: ModulationInputs, values: Tensor) -> Tensor:
    """Mean over the counted tokens, 0 where none counts: [T, E] -> [E]."""
    if x.token_mask is None:
        return values.sum(0) / max(values.shape[0], 1)
    # chosen, not multiplied by 0: a token that doesn't count may hold NaN
    return values.where(x.token_mask[:, None], 0).sum(0) / x.token_mask.sum().clamp_min(1)


def _route_backward(
    x: ModulationInputs,
    saved: Saved,
    d_probs: Tensor,
    grad_load: Tensor | None,
    grad_router_prob: Tensor | None,
) -> Tensor:
    """Gradient of the logits [T, E] through p (its soft Jacobian, also under hard routing) and both token means."""
    if x.token_mask is None:
        share = torch.full_like(saved.probs[:, :1], 1 / max(saved.probs.shape[0], 1))
    else:
        counted = x.token_mask.to(saved.probs.dtype)
        share = (counted / counted.sum().clamp_min(1))[:, None]
    if grad_load is not None:
        d_probs = d_probs + share * grad_load
    d_logits = softmax_backward(d_probs, saved.probs) / x.tau
    if grad_router_prob is not None:
        logits = saved.logits if x.given_logits is None else x.given_logits
        d_logits += softmax_backward(share * grad_router_prob, torch.softmax(logits, dim=-1))
    return d_logits


def softmax_backward(grad: Tensor, probs: Tensor) -> Tensor:
    """p * (g - sum_k g_k p_k)."""
    return probs * (grad - (grad * probs).sum(-1, keepdim=True))
