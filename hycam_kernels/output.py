"""What the op returns."""

from functools import cached_property
from typing import NamedTuple

from torch import Tensor


class HyCAMOutput(NamedTuple):
    """Result of `hycam_modulation`.

    Attributes:
        hidden_states: [..., d] h_out, in attn_output's dtype.
        load: [E] mean over the counted tokens of the routing weights p that were used.
        router_prob: [E] mean over the counted tokens of softmax(logits), free of noise and temperature.
        balance_loss: scalar, ``(load * router_prob).sum()`` (equation 10).

    The last three are float64 for float64 inputs and float32 otherwise, differentiable, and 0 where no token counts;
    without experts they are [0], [0] and 0.
    """

    hidden_states: Tensor
    load: Tensor
    router_prob: Tensor
    balance_loss: Tensor


class RouterMeans(NamedTuple):
    """The router's part of a `HyCAMOutput`."""

    load: Tensor
    router_prob: Tensor
    balance_loss: Tensor


class DeferredRouterMeans:
    """`RouterMeans` that are made when they are read: while a text is generated nobody reads those of every token.

    Args:
        probs: [E, T] p as it was used.
        logits: [E, T].
        token_mask: [T] bool, the tokens that count, or None; not to be written to.
    """

    def __init__(self, probs: Tensor, logits: Tensor, token_mask: Tensor | None) -> None:
        self.probs, self.logits, self.token_mask = probs, logits, token_mask

    @cached_property
    def load(self) -> Tensor:
        return self._mean(self.probs)

    @cached_property
    def router_prob(self) -> Tensor:
        return self._mean(self.logits.softmax(dim=0))

    @cached_property
    def balance_loss(self) -> Tensor:
        return self.load.dot(self.router_prob)

    def _mean(self, values: Tensor) -> Tensor:
        if self.token_mask is not None:
            # chosen, not multiplied by 0: a token that doesn't count may hold NaN
            return values.where(self.token_mask, 0).sum(1) / self.token_mask.sum().clamp_min(1)
        tokens = values.shape[1]
        return values.sum(1) if tokens <= 1 else values.sum(1) / tokens


class DeferredOutput(NamedTuple):
    """A `HyCAMOutput` whose router's part may not be made yet."""

    hidden_states: Tensor
    means: RouterMeans | DeferredRouterMeans


class NormProjectOutput(NamedTuple):
    """Result of `norm_project`.

    Attributes:
        hidden: [..., d] the normalised input h.
        v: [..., E, r] its low-rank projections ``h (N_k A_k)^T``.
        logits: [..., E] router logits ``h W_r^T``, float32 (float64 for float64 products).
    """

    hidden: Tensor
    v: Tensor
    logits: Tensor
