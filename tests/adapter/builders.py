"""Adapted tiny models, batches with padding, and the plain loop that the injected balance loss is measured against."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from hycam import HyCAMAttention, HyCAMConfig
from tests.models import tiny_model

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "olmo2", "granite", "gpt_neox", "gpt2"]


def config(**settings) -> HyCAMConfig:
    return HyCAMConfig(**({"r": 4, "num_experts": 3, "task_type": "CAUSAL_LM"} | settings))


def randomise(model: nn.Module, seed: int = 2) -> None:
    """Move every HyCAM parameter off its start, so that each branch changes the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hycam_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def adapted_model(
    family: str = "llama", *, dtype=torch.float32, sizes: Mapping[str, Any] | None = None, **settings
) -> PeftModel:
    """A tiny model, some of whose `sizes` may be others, with a randomised adapter, in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(tiny_model(family, dtype=dtype, **sizes or {}), config(**settings))
    randomise(model)
    return model.train()


def batch(seed: int = 0, rows: int = 3, length: int = 9) -> dict[str, Tensor]:
    """Token ids with padding on either side, and labels."""
    ids = torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, length - 3 :] = 0
    mask[1, :2] = 0
    ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def layers_of(model: nn.Module) -> dict[str, HyCAMAttention]:
    return {name: module for name, module in model.named_modules() if isinstance(module, HyCAMAttention)}


def by_saved_name(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """A HyCAM layer's or model's tensors of the adapter "default" by the names that they have in a file."""
    return {HyCAMAttention.saved_name(name.replace(".default", "")): tensor for name, tensor in named}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Take the trainable parameters' gradients off the model."""
    taken = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            taken[name] = parameter.grad
            parameter.grad = None
    return taken


def largest_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest deviation of a gradient, relative to the largest entry of the wanted one."""
    assert got.keys() == want.keys()
    return max(float((got[name] - want[name]).abs().max() / want[name].abs().max()) for name in want)


def plain_loss(model: nn.Module, inputs: dict[str, Tensor], *, coef: float, scope: str = "layer") -> Tensor:
    """Equation 14 as a training loop writes it: the model's loss, plus coef times equation 10 of what its routers see.

    For a model whose own balance loss is off, that draws no noise and has the default tau; the loads are made here,
    from the layers' inputs.
    """
    output, balance = plain_balance(model, inputs, scope=scope)
    return output.loss + coef * balance


def plain_balance(model: nn.Module, inputs: dict[str, Tensor], *, scope: str = "layer") -> tuple[Any, Tensor]:
    """The model's output, and equation 10 of what its routers see."""
    loads, probs = [], []
    mask = inputs.get("attention_mask")

    def note(layer, args, kwargs):
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        weight = next(iter(layer.hycam_router.values())).weight
        logits = hidden.float() @ weight.float().T
        counted = logits.flatten(0, 1) if mask is None else logits[mask.bool()]
        loads.append((counted / 0.5).softmax(-1).mean(0))
        probs.append(counted.softmax(-1).mean(0))

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers_of(model).values()]
    output = model(**inputs)
    for handle in handles:
        handle.remove()
    load, prob = torch.stack(loads), torch.stack(probs)
    return output, (load * prob).sum(-1).mean() if scope == "layer" else (load.mean(0) * prob.mean(0)).sum()
