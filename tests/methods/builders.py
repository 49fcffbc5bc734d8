"""Single adapted layers and tiny adapted models, off their starting values, in float64 where formulas are compared."""

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from hycam.methods import MoeLoraConfig, MoeLoraLinear, MultiLoraConfig, MultiLoraLinear
from hycam.methods.low_rank import LowRankConfig, LowRankLinear
from tests.models import tiny_model

LAYERS: dict[type, type[LowRankLinear]] = {MultiLoraConfig: MultiLoraLinear, MoeLoraConfig: MoeLoraLinear}


def multilora(**settings: Any) -> MultiLoraConfig:
    return MultiLoraConfig(**({"r": 4, "num_adapters": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings))


def moelora(**settings: Any) -> MoeLoraConfig:
    defaults = {"r": 4, "num_experts": 4, "top_k": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
    return MoeLoraConfig(**(defaults | settings))


def randomise(module: nn.Module, seed: int = 2, scale: float = 0.3) -> None:
    """Move every trainable parameter off its start, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def layer(config: LowRankConfig, in_features: int = 7, out_features: int = 6) -> LowRankLinear:
    """One randomised layer in float64; the same one at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        base = nn.Linear(in_features, out_features).double()
        made = LAYERS[type(config)](base, config)
    randomise(made)
    return made


def adapter(made: LowRankLinear, adapter_name: str = "default") -> dict[str, Tensor]:
    """The parameters of one of the layer's adapters, by name."""
    return {name: getattr(made, name)[adapter_name].weight for name in made.adapter_layer_names}


def inputs(*leading: int, features: int = 7, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, features, generator=generator, dtype=torch.float64).requires_grad_()


def adapted_model(config: LowRankConfig, *, seed: int = 2, family: str = "llama", dtype=torch.float32) -> PeftModel:
    """A tiny model with a randomised adapter, in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(tiny_model(family, dtype=dtype), config)
    randomise(model, seed, scale=0.1)
    return model.train()


def gradients_of(output: Tensor, upstream: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(output, wanted, upstream))
