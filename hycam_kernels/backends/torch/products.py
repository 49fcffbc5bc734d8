"""The op's matrix products by torch, and their gradients, for the backends that leave them to the library."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hycam_kernels.folding import fold
from hycam_kernels.inputs import ModulationInputs, Saved


class Sum:
    """A running sum of matrix products."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def add_product(self, a: Tensor, b: Tensor) -> None:
        self.value = a @ b if self.value is None else self.value.addmm_(a, b)


def shared_product(x: ModulationInputs, hidden: Tensor) -> Tensor | None:
    """S = h W_shared^T + bias."""
    if x.shared_weight is None:
        return None
    bias = None if x.shared_bias is None else x.shared_bias.to(x.compute_dtype)
    return F.linear(hidden, x.shared_weight.to(x.compute_dtype), bias)


def shared_backward(
    x: ModulationInputs,
    hidden: Tensor,
    d_s: Tensor,
    need: dict[str, bool],
    grads: dict[str, Tensor],
    d_hidden: Sum,
) -> None:
    """Adds what S's gradient gives those of W_shared and h."""
    assert x.shared_weight is not None
    if need["shared_weight"]:
        grads["shared_weight"] = d_s.T @ hidden
    if need["hidden"]:
        d_hidden.add_product(d_s, x.shared_weight.to(x.compute_dtype))


def folded_product(x: ModulationInputs, hidden: Tensor) -> Tensor | None:
    """V = h M^T + bias, [T, E * r], unless it was given; None without low-rank experts."""
    if x.given_v is not None:
        return x.given_v
    return None if x.lora_a is None else F.linear(hidden, *fold(x))


def expert_operands(x: ModulationInputs, hidden: Tensor, v: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """(V_k [T, r], B_k [d, r]) or (h [T, d], W_k [d, d]), in the compute dtype."""
    if v is not None and x.lora_b is not None:
        return v[:, k * x.rank : (k + 1) * x.rank], x.lora_b[k].to(x.compute_dtype)
    assert x.expert_weight is not None
    return hidden, x.expert_weight[k].to(x.compute_dtype)


def chosen_product(x: ModulationInputs, hidden: Tensor, v: Tensor | None, p: Tensor) -> Tensor:
    """Of each token, V_k B_k^T + b_k or h W_k^T of the expert k with p_k other than 0: [T, d] in the compute dtype."""
    product = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    for k in range(x.num_experts):
        tokens = p[:, k].nonzero().squeeze(1)
        inputs, weight = expert_operands(x, hidden, v, k)
        bias = None if x.lora_b_bias is None else x.lora_b_bias[k].to(x.compute_dtype)
        product.index_copy_(0, tokens, F.linear(inputs.index_select(0, tokens), weight, bias))
    return product


def used_probs(x: ModulationInputs, probs: Tensor) -> Tensor:
    """p as the output and the load use it: one-hot under hard routing, but NaN where p is."""
    if not (x.hard and x.num_experts):
        return probs
    return F.one_hot(probs.argmax(dim=-1), x.num_experts) + (probs - probs)


def kept(x: ModulationInputs, s: Tensor | None, v: Tensor | None, probs: Tensor, logits: Tensor) -> Saved:
    """What the backward gets of these beside the inputs."""
    return Saved(
        s if x.keep and s is not None else probs.new_empty(0, dtype=x.compute_dtype),
        v if x.keep and v is not None and x.given_v is None else probs.new_empty(0, dtype=x.compute_dtype),
        probs,
        logits if x.given_logits is None else probs.new_empty(0),
    )
