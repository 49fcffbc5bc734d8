"""The formulation of the authors' released code, from its known differences to the paper: the peer that users had.

Biases everywhere, hard routing by `F.gumbel_softmax` in the activations' dtype, the scale alpha / r inside the SiLU,
experts' outputs stacked before they are weighted, and the residual stream modulated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ALPHA = 32


def released_layer(
    hidden: Tensor,
    attn_output: Tensor,
    residual: Tensor,
    shared_weight: Tensor,
    lora_a: Tensor,
    lora_n: Tensor,
    lora_b: Tensor,
    router_weight: Tensor,
    shared_bias: Tensor,
    lora_a_bias: Tensor,
    lora_n_bias: Tensor,
    lora_b_bias: Tensor,
    router_bias: Tensor,
    *,
    tau: float,
    scale: float,
) -> Tensor:
    """The layer's residual stream after attention, [T, d]: ``(h_in + h_att) * (1 + A_fusion)``.

    Noise comes from torch's generator. Shapes are those of `hycam_kernels.hycam_modulation`.
    """
    fusion = F.silu(F.linear(hidden, shared_weight, shared_bias))
    outputs = []
    for k in range(router_weight.shape[0]):
        z = F.linear(hidden, lora_a[k], lora_a_bias[k])
        z = F.linear(z, lora_n[k], lora_n_bias[k])
        z = F.linear(z, lora_b[k], lora_b_bias[k])
        outputs.append(F.silu(scale * z))
    weights = F.gumbel_softmax(F.linear(hidden, router_weight, router_bias), tau=tau, hard=True)
    fusion = fusion + (torch.stack(outputs, dim=1) * weights[..., None]).sum(1)
    return (residual + attn_output) * (1 + fusion)


def noisy_logits(hidden: Tensor, router_weight: Tensor, router_bias: Tensor) -> Tensor:
    """The logits with noise that `released_layer` draws from the generator's present state, which it advances alike."""
    logits = F.linear(hidden, router_weight, router_bias)
    noise = -torch.empty_like(logits, memory_format=torch.legacy_contiguous_format).exponential_().log()
    return logits + noise
