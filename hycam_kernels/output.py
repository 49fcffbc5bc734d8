"""What the op returns."""

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
