"""The definition of correct: HyCAM's equations (CIKM 2025, the paper's numbers), line by line, under plain autograd.

Every tensor may have any float dtype; run it in float64 to get the truth that the backends are measured against, in low
precision to get the error that eager execution makes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hycam_kernels.output import HyCAMOutput, NormProjectOutput
from hycam_kernels.philox import gumbel_noise


def modulation_reference(
    hidden: Tensor,
    attn_output: Tensor,
    shared_weight: Tensor | None,
    lora_a: Tensor | None,
    lora_n: Tensor | None,
    lora_b: Tensor | None,
    router_weight: Tensor | None,
    *,
    tau: float = 0.5,
    gumbel: Tensor | None = None,
    seed: int | Tensor | None = None,
    hard: bool = False,
    token_mask: Tensor | None = None,
    scale: float = 1.0,
    shared_bias: Tensor | None = None,
    lora_a_bias: Tensor | None = None,
    lora_n_bias: Tensor | None = None,
    lora_b_bias: Tensor | None = None,
    router_bias: Tensor | None = None,
    expert_weight: Tensor | None = None,
    residual: Tensor | None = None,
    projections: tuple[Tensor, Tensor] | None = None,
) -> HyCAMOutput:
    """`hycam_modulation` as the paper writes it: the op's arguments, shapes and results, without its checks."""
    dtype = hidden.dtype
    sum_dtype = torch.promote_types(dtype, torch.float32)
    fusion = torch.zeros_like(attn_output, dtype=dtype)

    # (2, 5) A_shared = SiLU(h W_shared^T)
    if shared_weight is not None:
        fusion = fusion + F.silu(F.linear(hidden, shared_weight.to(dtype), _to(shared_bias, dtype)))

    load = router_prob = hidden.new_zeros(0, dtype=sum_dtype)
    if router_weight is not None or projections is not None:
        # (8) logits = h W_router^T
        if projections is not None:
            logits = projections[1].to(sum_dtype)
        else:
            assert router_weight is not None
            router = router_weight.to(dtype).to(sum_dtype)
            logits = F.linear(hidden.to(sum_dtype), router, _to(router_bias, sum_dtype))
        num_experts = logits.shape[-1]

        # (9) p = softmax((logits + g) / tau)
        if seed is not None:
            num_tokens = logits.numel() // num_experts
            gumbel = gumbel_noise(seed, num_tokens, num_experts, hidden.device).view(logits.shape)
        noisy = logits if gumbel is None else logits + gumbel.detach().to(sum_dtype)
        p = torch.softmax(noisy / tau, dim=-1)
        if hard:
            one_hot = F.one_hot(p.argmax(dim=-1), num_experts).to(sum_dtype)
            p = one_hot + p - p.detach()

        # (6, 7) A_k = SiLU(scale * (B_k (N_k (A_k h + a_k) + n_k) + b_k)); (11) A_fusion = A_shared + sum_k p_k A_k
        for k in range(num_experts):
            z = hidden
            if expert_weight is not None:
                z = F.linear(z, expert_weight[k].to(dtype), _bias(lora_b_bias, k, dtype))
            else:
                assert lora_b is not None
                if projections is not None:
                    z = projections[0][..., k, :].to(dtype)
                else:
                    assert lora_a is not None and lora_n is not None
                    z = F.linear(z, lora_a[k].to(dtype), _bias(lora_a_bias, k, dtype))
                    z = F.linear(z, lora_n[k].to(dtype), _bias(lora_n_bias, k, dtype))
                z = F.linear(z, lora_b[k].to(dtype), _bias(lora_b_bias, k, dtype))
            fusion = fusion + p[..., k : k + 1].to(dtype) * F.silu(scale * z)

        # (10) the two means of the balance loss, over the tokens that count
        load = _token_mean(p, token_mask)
        router_prob = _token_mean(torch.softmax(logits, dim=-1), token_mask)

    # (4, 12) h_out = h_att + h_att * A_fusion, or the released code's residual stream in h_att's place
    stream = attn_output if residual is None else residual + attn_output
    out = attn_output + stream * fusion
    return HyCAMOutput(out.to(attn_output.dtype), load, router_prob, (load * router_prob).sum())


def norm_project_reference(
    hidden_in: Tensor,
    norm_weight: Tensor,
    lora_a: Tensor,
    lora_n: Tensor,
    router_weight: Tensor,
    *,
    norm_bias: Tensor | None = None,
    eps: float,
    kind: str = "rms",
) -> NormProjectOutput:
    """`norm_project` line by line: the op's arguments, shapes and results, without its checks."""
    x = hidden_in.to(torch.promote_types(hidden_in.dtype, torch.float32))
    if kind == "rms":
        # x / sqrt(mean(x^2) + eps), rounded to the input's dtype, times the weight (as Llama does)
        normalised = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        hidden = norm_weight * normalised.to(hidden_in.dtype)
    else:
        # (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
        centred = x - x.mean(-1, keepdim=True)
        normalised = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        shifted = normalised * norm_weight if norm_bias is None else normalised * norm_weight + norm_bias
        hidden = shifted.to(torch.promote_types(hidden_in.dtype, norm_weight.dtype))

    dtype = hidden.dtype
    sum_dtype = torch.promote_types(dtype, torch.float32)
    # V_k = N_k A_k h
    projections = [F.linear(F.linear(hidden, a.to(dtype)), n.to(dtype)) for a, n in zip(lora_a, lora_n, strict=True)]
    logits = F.linear(hidden.to(sum_dtype), router_weight.to(dtype).to(sum_dtype))
    return NormProjectOutput(hidden, torch.stack(projections, -2), logits)


def _token_mean(values: Tensor, token_mask: Tensor | None) -> Tensor:
    values = values.reshape(-1, values.shape[-1])
    if token_mask is None:
        return values.sum(0) / max(values.shape[0], 1)
    mask = token_mask.flatten()
    return values.where(mask[:, None], 0).sum(0) / mask.sum().clamp_min(1)


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _bias(stacked: Tensor | None, expert: int, dtype: torch.dtype) -> Tensor | None:
    return None if stacked is None else stacked[expert].to(dtype)
