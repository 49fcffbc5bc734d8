"""N folded into A in weight space, ``M_k = N_k A_k``, so that one product ``V = h M^T`` serves all experts."""

import torch
from torch import Tensor

from hycam_kernels.inputs import ModulationInputs, NormProjectInputs


def fold(x: ModulationInputs) -> tuple[Tensor, Tensor | None]:
    """M [E * r, d] in the compute dtype, M_k = N_k A_k, and its bias N_k a_k + n_k [E * r] or None."""
    assert x.lora_a is not None and x.lora_n is not None
    folded = fold_weights(x.lora_n, x.lora_a, x.compute_dtype)
    bias = None
    if x.lora_a_bias is not None:
        bias = (x.lora_n.to(x.sum_dtype) @ x.lora_a_bias.to(x.sum_dtype)[..., None]).flatten()
    if x.lora_n_bias is not None:
        lora_n_bias = x.lora_n_bias.to(x.sum_dtype).flatten()
        bias = lora_n_bias if bias is None else bias + lora_n_bias
    return folded, None if bias is None else bias.to(x.compute_dtype)


def fold_weights(lora_n: Tensor, lora_a: Tensor, dtype: torch.dtype) -> Tensor:
    """M [E * r, d], M_k = N_k A_k, summed in float32 at least from the weights as they are, rounded to dtype once."""
    return _product(lora_n, lora_a.to(torch.promote_types(lora_a.dtype, dtype))).flatten(0, 1).to(dtype)


def fold_router(x: ModulationInputs | NormProjectInputs) -> Tensor:
    """[M | W_r], [E r + E, d] and finite rows up to `aligned_rows`, in the compute dtype."""
    assert x.lora_a is not None and x.lora_n is not None and x.router_weight is not None
    folded = fold_weights(x.lora_n, x.lora_a, x.compute_dtype)
    router_weight = x.router_weight.to(x.compute_dtype)
    beyond = aligned_rows(x) - folded.shape[0] - router_weight.shape[0]
    # any row will do: what multiplies it is 0
    return torch.cat([folded, router_weight, router_weight[:1].expand(beyond, -1)])


def aligned_rows(x: ModulationInputs | NormProjectInputs) -> int:
    """E r + E up to a multiple of 8: products of 16-bit types want rows of V and the logits of 16 bytes or more."""
    return -(-x.num_experts * (x.rank + 1) // 8) * 8


def has_bias(x: ModulationInputs) -> bool:
    """Whether the folded product has a bias, N_k a_k + n_k."""
    return x.lora_a_bias is not None or x.lora_n_bias is not None


def unfold_grads(
    x: ModulationInputs, d_folded: Tensor, d_bias: Tensor | None, need: dict[str, bool]
) -> dict[str, Tensor]:
    """Gradients of A, N, a and n from those of M [E * r, d] and of its bias, if any, in the sum dtype [E * r]."""
    assert x.lora_a is not None and x.lora_n is not None
    grads = _unfold(x.lora_a, x.lora_n, d_folded, need)
    if d_bias is None:
        return grads
    d_bias = d_bias.view(x.num_experts, x.rank)
    if need["lora_n"] and x.lora_a_bias is not None:
        grads["lora_n"] = grads["lora_n"] + d_bias[:, :, None] * x.lora_a_bias[:, None, :]
    if need["lora_a_bias"]:
        grads["lora_a_bias"] = _product(x.lora_n.mT, d_bias[..., None]).squeeze(-1)
    if need["lora_n_bias"]:
        grads["lora_n_bias"] = d_bias
    return grads


def low_rank_gradients(
    grad_v: Tensor, x: NormProjectInputs, operand: Tensor, need: dict[str, bool]
) -> dict[str, Tensor]:
    """Gradients of A and N as far as they are needed; ``operand`` is h in the compute dtype."""
    if not (need["lora_a"] or need["lora_n"]):
        return {}
    return _unfold(x.lora_a, x.lora_n, (grad_v.T @ operand).to(x.sum_dtype), need)


def _unfold(lora_a: Tensor, lora_n: Tensor, d_folded: Tensor, need: dict[str, bool]) -> dict[str, Tensor]:
    d_folded = d_folded.view_as(lora_a)
    grads = {}
    if need["lora_a"]:
        grads["lora_a"] = _product(lora_n.mT, d_folded)
    if need["lora_n"]:
        grads["lora_n"] = _product(d_folded, lora_a.mT)
    return grads


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in the wider of their dtypes; of two low-precision matrices the library sums in float32 and rounds once."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype) @ b.to(dtype)
