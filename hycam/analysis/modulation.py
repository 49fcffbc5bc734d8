"""What HyCAM does to each token of one prompt."""

from typing import Any

import torch
from torch import nn

from hycam.adapter.attention import HyCAMAttention
from hycam.errors import InputError
from hycam.evaluation.batches import device_of, evaluation_mode, unwrap


def prompt_modulation(
    model: nn.Module, input_ids: list[int], *, max_layers: int | None = None, adapter_name: str | None = None
) -> dict[str, torch.Tensor]:
    """A_fusion (equation 11, without noise) of the adapted layers over one sequence.

    Args:
        model: with a HyCAM adapter, plain or inside DistributedDataParallel.
        input_ids: the sequence's tokens.
        max_layers: at most so many layers, evenly spaced from the first to the last; None for all.
        adapter_name: the adapter; the active one by default.

    Returns:
        Module path of a layer -> [tokens, d] in the model's dtype, on the CPU, in the model's order.

    Raises:
        InputError: no token, `max_layers` below 1, a model without HyCAM layers, or an adapter that it lacks.
    """
    bare = unwrap(model)
    layers = {name: module for name, module in bare.named_modules() if isinstance(module, HyCAMAttention)}
    if not layers:
        raise InputError(f"model: {type(bare).__name__} without a HyCAM layer given, one with an adapter is wanted")
    if not input_ids:
        raise InputError("input_ids: none given, at least one token is wanted")
    modulation: dict[str, torch.Tensor] = {}
    handles = []
    for name in _evenly_spaced(list(layers), max_layers):

        def record(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            modulation[name] = layer.modulation(hidden, adapter_name)[0].cpu()

        handles.append(layers[name].register_forward_pre_hook(record, with_kwargs=True))
    try:
        with evaluation_mode(bare):
            bare(input_ids=torch.tensor([input_ids], device=device_of(bare)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return modulation


def _evenly_spaced(names: list[str], count: int | None) -> list[str]:
    if count is None or count >= len(names):
        return names
    if count < 1:
        raise InputError(f"max_layers: {count} given, at least 1 is wanted")
    if count == 1:
        return names[-1:]
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]
