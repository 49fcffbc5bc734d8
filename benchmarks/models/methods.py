"""The ways to train a backbone that are compared: each takes a model and returns it ready for training."""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.models.backbones import ModelShape
from hycam import HyCAMAttention, HyCAMConfig
from hycam.adapter.config import Backend
from hycam.methods import MoeLoraConfig, MultiLoraConfig
from hycam_kernels.output import DeferredOutput, RouterMeans
from hycam_kernels.reference import modulation_reference

Adapt = Callable[[PreTrainedModel, ModelShape], nn.Module]


class EagerHyCAMAttention(HyCAMAttention):
    """HyCAM with the op's reference under plain autograd; its noise is torch's own, which is cheaper than Philox."""

    def _modulate(self, adapter_name: str, hidden: Tensor, attn_output: Tensor, **options: Any) -> DeferredOutput:
        config = self.adapter_configs[adapter_name]
        shared_weight, _ = self._projection("hycam_shared", adapter_name)
        router_weight, _ = self._projection("hycam_router", adapter_name)
        assert options.pop("projections", None) is None, "the reference makes its own projections"
        noise = None
        if options.pop("seed") is not None:
            size = (*hidden.shape[:-1], config.num_experts)
            noise = -torch.empty(size, dtype=torch.float32, device=hidden.device).exponential_().log()
        hidden_states, *means = modulation_reference(
            hidden,
            attn_output,
            shared_weight,
            self.hycam_lora_a[adapter_name](),
            self.hycam_lora_n[adapter_name](),
            self.hycam_lora_b[adapter_name](),
            router_weight,
            tau=config.tau,
            gumbel=noise,
            **options,
        )
        return DeferredOutput(hidden_states, RouterMeans(*means))


def hycam_config(shape: ModelShape, backend: Backend = "auto") -> HyCAMConfig:
    return HyCAMConfig(r=shape.rank, num_experts=shape.num_experts, backend=backend)


def _frozen(model: PreTrainedModel, shape: ModelShape) -> nn.Module:
    return model.requires_grad_(False)


def _full(model: PreTrainedModel, shape: ModelShape) -> nn.Module:
    return model


def _peft(make_config: Callable[[ModelShape], PeftConfig]) -> Adapt:
    def adapt(model: PreTrainedModel, shape: ModelShape) -> nn.Module:
        # every parameter in the backbone's dtype: in float32, PEFT's default, LoRA would multiply in float32
        return get_peft_model(model, make_config(shape), autocast_adapter_dtype=False)

    return adapt


def _eager(model: PreTrainedModel, shape: ModelShape) -> nn.Module:
    adapted = _peft(hycam_config)(model, shape)
    for module in adapted.modules():
        if isinstance(module, HyCAMAttention):
            module.__class__ = EagerHyCAMAttention
    return adapted


def _lora(shape: ModelShape) -> LoraConfig:
    return LoraConfig(r=shape.rank, lora_alpha=shape.rank, target_modules="all-linear")


METHODS: dict[str, Adapt] = {
    "frozen": _frozen,
    "hycam-fused": _peft(lambda shape: hycam_config(shape, "triton")),
    "hycam-torch": _peft(lambda shape: hycam_config(shape, "torch")),
    "hycam-eager": _eager,
    "lora": _peft(_lora),
    "multilora": _peft(lambda shape: MultiLoraConfig(r=shape.rank, num_adapters=shape.num_experts)),
    "moe-lora": _peft(
        lambda shape: MoeLoraConfig(r=shape.rank, num_experts=shape.num_experts, top_k=min(3, shape.num_experts))
    ),
    "full": _full,
}
HYCAM = tuple(name for name in METHODS if name.startswith("hycam"))
