"""The op for few tokens without gradients, in PyTorch: decoding, and small calls in evaluation.

Reading the weights and dispatching operations is the work here. So all experts share each product and each element-wise
term, and every weight is read once, as it is stored:

.. math::
    U = h A^T + a,\\quad V_k = U_k N_k^T + n_k,\\quad Z_k = \\mathrm{scale}\\,(V_k B_k^T + b_k)

N is not folded into A. Folding multiplies by N as many rows as A has columns, d, where here it multiplies as many as
there are tokens; that costs less than telling whether a product that was kept is still that of the weights, since a
write through `.data` leaves no trace but the values.

A weight in the sum dtype beside narrower inputs is multiplied as it is: rounding it takes longer than the product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hycam_kernels.inputs import ModulationInputs, Saved
from hycam_kernels.philox import gumbel_noise

# Of E [T, d] expert outputs: more are better made one by one in blocks that the cache holds, with N folded once.
_MAX_ELEMENTS = 1 << 18


def takes(x: ModulationInputs) -> bool:
    """Whether `forward` is made for a call without gradients."""
    tokens, d = x.shape
    return tokens * d * max(x.num_experts, 1) <= _MAX_ELEMENTS


def forward(x: ModulationInputs) -> tuple[Tensor, Tensor, Tensor]:
    """h_out [T, d], p as it was used and the router's logits [E, T]; p and logits in the sum dtype."""
    probs, logits = _route(x)
    fusion = _shared(x)
    if x.num_experts:
        fusion = _add_experts(x, fusion, probs)
    attn_output = x.attn_output.to(x.sum_dtype).contiguous()
    stream = attn_output if x.residual is None else attn_output + x.residual
    out = torch.addcmul(attn_output, stream, fusion)
    return out.to(x.attn_output.dtype), probs, logits


def as_saved(x: ModulationInputs, probs: Tensor, logits: Tensor) -> Saved:
    """What a call that keeps nothing returns for the backward."""
    s, v = (x.hidden.new_empty(0, dtype=x.compute_dtype) for _ in range(2))
    logits = logits.T.contiguous() if x.given_logits is None else logits.new_empty(0)
    return Saved(s, v, probs.T.contiguous(), logits)


def _shared(x: ModulationInputs) -> Tensor:
    """SiLU(S) [T, d] in the sum dtype; 0 without a shared CAM."""
    if x.shared_weight is None:
        return x.hidden.new_zeros(x.shape, dtype=x.sum_dtype)
    s = _linear(x, x.shared_weight, x.shared_bias).to(x.sum_dtype)
    return F.silu(s, inplace=True)


def _route(x: ModulationInputs) -> tuple[Tensor, Tensor]:
    """p as the output and the load use it, and logits, [E, T]: a softmax over rows is the faster one on a CPU."""
    if x.given_logits is not None:
        logits = x.given_logits.T
    elif x.router_weight is not None:
        hidden, weight = (operand.to(x.compute_dtype).to(x.sum_dtype) for operand in (x.hidden, x.router_weight))
        if x.router_bias is None:
            logits = torch.mm(weight, hidden.T)
        else:
            logits = torch.addmm(x.router_bias.to(x.sum_dtype).unsqueeze(1), weight, hidden.T)
    else:
        empty = x.hidden.new_empty(0, x.shape[0], dtype=x.sum_dtype)
        return empty, empty
    noise = x.gumbel
    if x.seed is not None:
        noise = gumbel_noise(x.seed, x.shape[0], x.num_experts, logits.device)
    noisy = logits if noise is None else logits + noise.to(x.sum_dtype).T
    probs = torch.softmax(noisy / x.tau, dim=0)
    if x.hard:
        # one-hot, but NaN where p is
        probs = F.one_hot(probs.argmax(dim=0), x.num_experts).T + (probs - probs)
    return probs, logits


def _add_experts(x: ModulationInputs, fusion: Tensor, probs: Tensor) -> Tensor:
    """fusion + sum_k p_k SiLU(Z_k) [T, d] in the sum dtype."""
    z = _expert_outputs(x)
    if x.hard:
        # chosen, not multiplied by 0: what an expert that isn't used makes may be infinite
        chosen = probs.argmax(dim=0).view(1, -1, 1)
        z = z.gather(0, chosen.expand(1, *z.shape[1:]))
        probs = probs.sum(0, keepdim=True)
    z = z.to(x.sum_dtype)
    if x.scale != 1:
        z *= x.scale
    activations = F.silu(z, inplace=True)
    if x.shape[0] == 1:
        return fusion.addmm_(probs.T, activations.squeeze(1))
    return fusion.add_(activations.mul_(probs.unsqueeze(-1)).sum(0))


def _expert_outputs(x: ModulationInputs) -> Tensor:
    """V_k B_k^T + b_k, or h W_k^T + b_k with full-rank experts: [E, T, d], no view of an argument."""
    if x.expert_weight is not None:
        bias = None if x.lora_b_bias is None else x.lora_b_bias.flatten()
        return _per_expert(x, _linear(x, x.expert_weight.flatten(0, 1), bias))
    assert x.lora_b is not None
    dtype = _product_dtype(x, x.lora_b)
    v = _projected(x).to(dtype)
    return _batched(v, x.lora_b.to(dtype), x.lora_b_bias)


def _projected(x: ModulationInputs) -> Tensor:
    """V [E, T, r]."""
    if x.given_v is not None:
        return _per_expert(x, x.given_v)
    assert x.lora_a is not None and x.lora_n is not None
    bias = None if x.lora_a_bias is None else x.lora_a_bias.flatten()
    u = _per_expert(x, _linear(x, x.lora_a.flatten(0, 1), bias)).to(x.sum_dtype)
    # so small that the wider dtype's cast is cheaper than a low-precision product's set-up
    return _batched(u, x.lora_n.to(x.sum_dtype), x.lora_n_bias)


def _product_dtype(x: ModulationInputs, weight: Tensor) -> torch.dtype:
    return x.sum_dtype if weight.dtype == x.sum_dtype else x.compute_dtype


def _linear(x: ModulationInputs, weight: Tensor, bias: Tensor | None) -> Tensor:
    """h weight^T + bias [T, out]."""
    dtype = _product_dtype(x, weight)
    return F.linear(x.hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _batched(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[E, T, in] by [E, out, in], plus [E, out]: [E, T, out]."""
    if bias is None:
        return torch.bmm(inputs, weight.mT)
    return torch.baddbmm(bias.to(weight.dtype).unsqueeze(1), inputs, weight.mT)


def _per_expert(x: ModulationInputs, joined: Tensor) -> Tensor:
    """[T, E * n] as [E, T, n]."""
    tokens, width = x.shape[0], joined.shape[1] // x.num_experts
    if tokens == 1:
        return joined.view(x.num_experts, 1, width)
    return joined.view(tokens, x.num_experts, width).transpose(0, 1)
