"""MoE-LoRA, and what RieMoE-LoRA (arXiv 2502.15828) changes in its forward pass: the gate correction."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hycam.adapter.parameters import AdapterParameters, kaiming_uniform
from hycam.adapter.peft_type import ForeignPeftType
from hycam.errors import InputError
from hycam.methods.low_rank import LowRankConfig, LowRankLinear, LowRankModel, check_count

MOELORA = ForeignPeftType("MOELORA")

GateCorrection = Literal["none", "engineering", "theoretical"]

_NO_MERGE = "MoE-LoRA can't be merged into a backbone: the gates depend on the input; unload() returns it bare"


@dataclass
class MoeLoraConfig(LowRankConfig):
    """Settings of a MoE-LoRA adapter: `LowRankConfig`'s, and these.

    Args:
        num_experts: number E of experts in each layer.
        top_k: experts that a token keeps.
        gate_correction: the weight q of a token in its expert's gradient, where the forward pass has g:
            "none": g, as autograd gives; "engineering": sqrt(g); "theoretical": 1, which is g / g: since the
            Riemannian preconditioner is linear in the gradient, its division by g is one of each token's share.
    """

    num_experts: int = 5
    top_k: int = 3
    gate_correction: GateCorrection = "none"

    method_name: ClassVar[str] = "MoE-LoRA"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MOELORA
        check_count("num_experts", self.num_experts)
        check_count("top_k", self.top_k)
        if self.top_k > self.num_experts:
            raise InputError(f"top_k: got {self.top_k}, want at most num_experts={self.num_experts}")
        if self.gate_correction not in get_args(GateCorrection):
            raise InputError(
                f"gate_correction: got {self.gate_correction!r}, want one of {', '.join(get_args(GateCorrection))}"
            )


class MoeLoraLinear(LowRankLinear):
    """``y = base(x) + (lora_alpha / r) * sum_i g_i(x) B_i A_i drop(x)``, see `LowRankLinear`.

    g is the softmax of ``x W_gate^T``, in float32 at least, cut to its `top_k` largest entries and divided by their
    sum. All experts are computed, those with g = 0 too.

    Parameters of an adapter: `moelora_A` [E, r, in], Kaiming-uniform (a = sqrt 5) per expert, `moelora_B` [E, out, r],
    zero, and `moelora_gate` W_gate [E, in], which starts like the weight of an `nn.Linear`.
    """

    adapter_layer_names = ("moelora_A", "moelora_B", "moelora_gate")
    stacked_names = adapter_layer_names
    moelora_A: AdapterParameters  # noqa: N815 (as PEFT writes lora_A and lora_B)
    moelora_B: AdapterParameters  # noqa: N815
    moelora_gate: AdapterParameters

    def parameter_shapes(self, config: MoeLoraConfig) -> dict[str, tuple[int, ...]]:
        E, r = config.num_experts, config.r
        return {
            "moelora_A": (E, r, self.in_features),
            "moelora_B": (E, self.out_features, r),
            "moelora_gate": (E, self.in_features),
        }

    def initialise(self, name: str, parameter: Tensor) -> None:
        if name == "moelora_B":
            nn.init.zeros_(parameter)
        else:
            kaiming_uniform(parameter)

    def delta(self, adapter_name: str, x: Tensor) -> Tensor:
        config: MoeLoraConfig = self.adapter_configs[adapter_name]
        lora_a, lora_b, gate = (getattr(self, name)[adapter_name]() for name in self.adapter_layer_names)
        x = self._cast_input_dtype(x, lora_a.dtype)
        gates = top_k_gates(F.linear(x, gate), config.top_k)
        projected = F.linear(self._dropped(adapter_name, x), lora_a.flatten(0, 1))
        projected = projected.unflatten(-1, (config.num_experts, config.r))  # [..., E, r]
        up = (config.scaling * lora_b).transpose(0, 1).flatten(1)  # [out, E * r]
        gates = gates.to(projected.dtype)
        if config.gate_correction == "none":
            return F.linear((gates[..., None] * projected).flatten(-2), up)
        weights = gates.detach().sqrt() if config.gate_correction == "engineering" else (gates > 0).to(gates.dtype)
        return _WeightedExperts.apply(gates, weights, projected, up.to(projected.dtype))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        raise NotImplementedError(_NO_MERGE)


def top_k_gates(logits: Tensor, top_k: int) -> Tensor:
    """Softmax over the last dimension, zero outside the `top_k` largest entries, divided by what is left.

    Args:
        logits: [..., E].

    Returns:
        [..., E], float32 or, for float64 logits, float64.
    """
    probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    kept, indices = probabilities.topk(top_k, dim=-1)
    return torch.zeros_like(probabilities).scatter(-1, indices, kept / kept.sum(-1, keepdim=True))


class _WeightedExperts(torch.autograd.Function):
    """``sum_i g_i E_i`` of ``E_i = B_i V_i``, whose gradient to the experts has the weights q in the place of g.

    It is ``q_i E_i + (g_i - q_i) stop(E_i)`` with one product instead of two, and without the cancellation of the two
    terms, which would cost low precisions the more digits the smaller g is.

    Args of `forward`: g [..., E], q [..., E], V [..., E, r], and the B side by side [out, E * r], all in one dtype.
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor, weights: Tensor, projected: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(weights, projected, up)
        return F.linear((gates[..., None] * projected).flatten(-2), up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        weights, projected, up = ctx.saved_tensors
        back = (grad @ up).unflatten(-1, projected.shape[-2:])  # [..., E, r]
        weighted = (weights[..., None] * projected).flatten(-2)
        grad_up = grad.reshape(-1, grad.shape[-1]).T @ weighted.reshape(-1, weighted.shape[-1])
        return (back * projected).sum(-1), None, weights[..., None] * back, grad_up


class MoeLoraModel(LowRankModel):
    """MoE-LoRA as a PEFT tuner."""

    prefix = "moelora_"
    tuner_layer_cls = MoeLoraLinear

    def _check_merge_allowed(self) -> NoReturn:
        raise NotImplementedError(_NO_MERGE)
