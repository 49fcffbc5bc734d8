"""The op for few tokens without gradients in one native pass, matrix products included: decoding.

Each weight is read once, as it is stored, and every sum is in float32: nothing is rounded before h_out is. Where more
tokens share the reading, products by blocks of both operands are faster, and torch has those.
"""

import torch
from torch import Tensor

from hycam_kernels.backends.cpu import library, passes
from hycam_kernels.backends.cpu.modulation import draw_noise
from hycam_kernels.inputs import ModulationInputs

_STREAMS = ("hidden", "attn_output", "residual")
_WEIGHTS = ("shared_weight", "lora_a", "lora_n", "lora_b", "router_weight", "expert_weight")


def takes(x: ModulationInputs) -> bool:
    """Whether `forward` is made for a call without gradients."""
    return (
        1 <= x.hidden.shape[0] <= passes.MOST_FEW_TOKENS
        and x.hidden.device.type == "cpu"
        and x.given_v is None
        and x.compute_dtype in passes.DTYPES
        and all(_fits(getattr(x, name), rows=True) for name in _STREAMS)
        and all(_fits(getattr(x, name), rows=False) for name in _WEIGHTS)
        and library.refusal() is None
    )


def _fits(tensor: Tensor | None, *, rows: bool) -> bool:
    if tensor is None:
        return True
    return tensor.dtype in passes.DTYPES and (tensor.stride(-1) == 1 if rows else tensor.is_contiguous())


def forward(x: ModulationInputs) -> tuple[Tensor, Tensor, Tensor]:
    """h_out [T, d], p as it was used and the router's logits [E, T], both in float32."""
    out, probs, logits = passes.few_tokens(
        x.hidden, x.attn_output, x.residual, x.shared_weight, x.lora_a, x.lora_n,
        x.lora_b if x.expert_weight is None else x.expert_weight, x.router_weight, _float(x.shared_bias),
        _float(x.lora_a_bias), _float(x.lora_n_bias), _float(x.lora_b_bias), _float(x.router_bias), draw_noise(x),
        x.tau, x.scale, x.hard,
    )  # fmt: skip
    return out, probs.T, logits.T


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32).contiguous()
