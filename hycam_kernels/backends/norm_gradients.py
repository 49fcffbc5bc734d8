"""The backward pass of `norm_project`, of which each backend makes the parts in its own way."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from hycam_kernels.folding import low_rank_gradients
from hycam_kernels.inputs import NORM_DIFFERENTIABLE, NormProjectInputs, NormSaved, NormUpstream, finish


class Parts(NamedTuple):
    """What a backend brings.

    Attributes:
        hidden: (upstream, x) -> G [T, d], the gradient of h through all three results; None
            where none of them has one.
        norm: (G, x, saved, need) -> the gradients of hidden_in, norm_weight and norm_bias, as far as they are needed.
        router_weight: (grad_logits, h in the compute dtype, x) -> the gradient of the router's weight [E, d].
    """

    hidden: Callable[[NormUpstream, NormProjectInputs], Tensor | None]
    norm: Callable[[Tensor, NormProjectInputs, NormSaved, dict[str, bool]], dict[str, Tensor]]
    router_weight: Callable[[Tensor, Tensor, NormProjectInputs], Tensor]


def norm_gradients(
    upstream: NormUpstream, x: NormProjectInputs, saved: NormSaved, needs: list[bool], parts: Parts
) -> list[Tensor]:
    """Gradients of the tensors in `NORM_DIFFERENTIABLE`, each in its tensor's dtype; 0 elements where not needed."""
    need = dict(zip(NORM_DIFFERENTIABLE, needs, strict=True))
    grads: dict[str, Tensor] = {}
    if need["hidden_in"] or need["norm_weight"] or need["norm_bias"]:
        gradient = parts.hidden(upstream, x)
        if gradient is not None:
            grads |= parts.norm(gradient, x, saved, need)
    operand = saved.hidden.to(x.compute_dtype)
    if upstream.v is not None:
        grads |= low_rank_gradients(upstream.v, x, operand, need)
    if upstream.logits is not None and need["router_weight"]:
        grads["router_weight"] = parts.router_weight(upstream.logits, operand, x)
    return [finish(x, name, grads.get(name), needed) for name, needed in need.items()]
