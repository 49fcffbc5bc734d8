"""Adapters of one shape, summed to a new one: PEFT's `add_weighted_adapter`."""

from collections.abc import Mapping
from typing import Any

from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor, nn

from hycam.adapter.config import is_finite
from hycam.errors import InputError


def check_combination(
    configs: Mapping[str, Any], adapters: Any, weights: Any, adapter_name: str, combination_type: str
) -> None:
    """Refuse what can't be summed. Raises `InputError` (a ValueError)."""
    if combination_type != "linear":
        raise InputError(
            f"combination_type: got {combination_type!r}, want 'linear': the others take LoRA's products apart"
        )
    if not isinstance(adapters, list | tuple) or not adapters or not all(name in configs for name in adapters):
        raise InputError(f"adapters: got {adapters!r}, want a list of {', '.join(configs)}")
    are_numbers = isinstance(weights, list | tuple) and all(is_finite(weight) for weight in weights)
    if not are_numbers or len(weights) != len(adapters):
        raise InputError(f"weights: got {weights!r}, want a finite number for each of {', '.join(adapters)}")
    if adapter_name in configs:
        raise InputError(f"adapter_name: got {adapter_name!r}, which is there already, want a new name")
    first, *others = adapters
    for name in others:
        differing = configs[first].differing(configs[name])
        if differing:
            shown = ", ".join(f"{field} ({ours!r}, {theirs!r})" for field, (ours, theirs) in differing.items())
            raise InputError(f"adapters: got {first} and {name}, which differ in {shown}, want the same settings")


def weighted_sum(model: nn.Module, adapters: list[str], weights: list[float]) -> dict[str, Tensor]:
    """Name -> the weighted sum of the adapters' parameters of that name, as PEFT saves them."""
    states = [get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False) for name in adapters]
    return {
        name: sum(weight * state[name] for weight, state in zip(weights, states, strict=True)) for name in states[0]
    }
