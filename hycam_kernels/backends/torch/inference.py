r"""The op for few tokens without gradients, in PyTorch: decoding, and small calls in evaluation.

Reading the weights and dispatching operations is the work here. So all experts share each product and each element-wise
term, and every weight is read once, as it is stored:

.. math::
    U = h A^T + a,\quad V_k = U_k N_k^T + n_k,\quad Z_k = \mathrm{scale}\,(V_k B_k^T + b_k)

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
    return x.hidden.numel() * max(x.num_experts, 1) <= _MAX_ELEMENTS


def forward(x: ModulationInputs) -> tuple[Tensor, Tensor, Tensor]:
    """h_out [T, d], p as it was used and the router's logits [E, T]; p and logits in the sum dtype."""
    sum_dtype = x.sum_dtype
    if x.shared_weight is None:
        fusion = x.hidden.new_zeros(x.shape, dtype=sum_dtype)
    else:
        s = _linear(x.hidden, x.shared_weight, x.shared_bias, _product_dtype(x, x.shared_weight, sum_dtype))
        fusion = F.silu(s.to(sum_dtype), inplace=True)
    if x.router_weight is None and x.given_logits is None:
        probs = logits = fusion.new_empty(0, fusion.shape[0])
    else:
        probs, logits = _route(x, sum_dtype)
        fusion = _add_experts(x, fusion, probs)
    attn_output = x.attn_output.to(sum_dtype).contiguous()
    stream = attn_output if x.residual is None else attn_output + x.residual
    out = torch.addcmul(attn_output, stream, fusion)
    return out.to(x.attn_output.dtype), probs, logits


def as_saved(x: ModulationInputs, probs: Tensor, logits: Tensor) -> Saved:
    """What a call that keeps nothing returns for the backward."""
    s, v = (x.hidden.new_empty(0, dtype=x.compute_dtype) for _ in range(2))
    probs, logits = (tensor.T.clone(memory_format=torch.contiguous_format) for tensor in (probs, logits))
    return Saved(s, v, probs, logits if x.given_logits is None else logits.new_empty(0))


def _route(x: ModulationInputs, sum_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """p as the output and the load use it, and logits, [E, T]: a softmax over rows is the faster one on a CPU."""
    if x.given_logits is not None:
        logits = x.given_logits.T
    else:
        assert x.router_weight is not None
        hidden, weight = (operand.to(x.compute_dtype).to(sum_dtype) for operand in (x.hidden, x.router_weight))
        if x.router_bias is None:
            logits = torch.mm(weight, hidden.T)
        else:
            logits = torch.addmm(x.router_bias.to(sum_dtype).unsqueeze(1), weight, hidden.T)
    noise = x.gumbel
    if x.seed is not None:
        noise = gumbel_noise(x.seed, x.hidden.shape[0], logits.shape[0], logits.device)
    noisy = logits if noise is None else logits + noise.to(sum_dtype).T
    probs = torch.softmax(noisy / x.tau, dim=0)
    if x.hard:
        # one-hot, but NaN where p is
        probs = F.one_hot(probs.argmax(dim=0), probs.shape[0]).T + (probs - probs)
    return probs, logits


def _add_experts(x: ModulationInputs, fusion: Tensor, probs: Tensor) -> Tensor:
    """fusion + sum_k p_k SiLU(Z_k) [T, d]; ``fusion`` is in the sum dtype and written over."""
    z = _expert_outputs(x, probs.shape[0], fusion.dtype)
    if x.hard:
        # chosen, not multiplied by 0: what an expert that isn't used makes may be infinite
        chosen = probs.argmax(dim=0).view(1, -1, 1)
        z = z.gather(0, chosen.expand(1, *z.shape[1:]))
        probs = probs.sum(0, keepdim=True)
    z = z.to(fusion.dtype)
    if x.scale != 1:
        z *= x.scale
    activations = F.silu(z, inplace=True)
    if fusion.shape[0] == 1:
        return fusion.addmm_(probs.T, activations.squeeze(1))
    return fusion.add_(activations.mul_(probs.unsqueeze(-1)).sum(0))


def _expert_outputs(x: ModulationInputs, num_experts: int, sum_dtype: torch.dtype) -> Tensor:
    """V_k B_k^T + b_k, or h W_k^T + b_k with full-rank experts: [E, T, d], no view of an argument."""
    if x.expert_weight is not None:
        weight, bias = x.expert_weight.flatten(0, 1), None if x.lora_b_bias is None else x.lora_b_bias.flatten()
        return _per_expert(_linear(x.hidden, weight, bias, _product_dtype(x, weight, sum_dtype)), num_experts)
    assert x.lora_b is not None
    if x.given_v is not None:
        v = _per_expert(x.given_v, num_experts)
    else:
        assert x.lora_a is not None and x.lora_n is not None
        weight, bias = x.lora_a.flatten(0, 1), None if x.lora_a_bias is None else x.lora_a_bias.flatten()
        u = _per_expert(_linear(x.hidden, weight, bias, _product_dtype(x, weight, sum_dtype)), num_experts)
        # so small that casts to the wider dtype are cheaper than a low-precision product's set-up
        v = _batched(u, x.lora_n, x.lora_n_bias, sum_dtype)
    return _batched(v, x.lora_b, x.lora_b_bias, _product_dtype(x, x.lora_b, sum_dtype))


def _product_dtype(x: ModulationInputs, weight: Tensor, sum_dtype: torch.dtype) -> torch.dtype:
    return sum_dtype if weight.dtype == sum_dtype else x.compute_dtype


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[T, in] by [out, in], plus [out]: [T, out]."""
    return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _batched(inputs: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[E, T, in] by [E, out, in], plus [E, out]: [E, T, out]."""
    inputs, weight = inputs.to(dtype), weight.to(dtype).mT
    return torch.bmm(inputs, weight) if bias is None else torch.baddbmm(bias.to(dtype).unsqueeze(1), inputs, weight)


def _per_expert(joined: Tensor, num_experts: int) -> Tensor:
    """[T, E * n] as [E, T, n]."""
    tokens, width = joined.shape
    if tokens == 1:
        return joined.view(num_experts, 1, width // num_experts)
    return joined.view(tokens, num_experts, width // num_experts).transpose(0, 1)
