"""How a HyCAM model's router spreads each task's tokens over the experts."""

from collections.abc import Mapping

import torch
from datasets import Dataset
from torch import nn

from hycam.adapter.binding import router_statistics
from hycam.errors import InputError
from hycam.evaluation.batches import Collate, evaluation_mode, iterate_batches, unwrap


def evaluate_expert_load(
    model: nn.Module,
    tasks: Mapping[str, Dataset],
    collator: Collate,
    *,
    batch_size: int = 8,
) -> dict[str, dict[str, list[float]]]:
    """Mean expert weights p (equation 9) over every token of each task, prompts included and padding left out.

    They are noise-free but for adapters with `noise="always"`.

    Args:
        model: with one active HyCAM adapter. For the arguments not named here see `evaluate_perplexity`.

    Returns:
        `{task: {module path of an adapted layer: [E] weights adding up to 1}}`, layers in the model's order.

    Raises:
        InputError: no task, an empty task, no active adapter, several, or one without experts.
    """
    if not tasks:
        raise InputError("tasks: none given, at least one is wanted")
    bare = unwrap(model)
    loads: dict[str, dict[str, list[float]]] = {}
    with evaluation_mode(bare):
        for name, dataset in tasks.items():
            if len(dataset) == 0:
                raise InputError(f"tasks: {name!r} has no row, at least one is wanted")
            weighted: dict[str, torch.Tensor] = {}
            tokens: dict[str, torch.Tensor] = {}
            for _, batch in iterate_batches(dataset, collator, batch_size, bare):
                batch.pop("labels")
                bare(**batch, use_cache=False)
                of_layers = router_statistics(bare)
                if not of_layers:
                    raise InputError(
                        "model: no HyCAM layer with experts ran, an active adapter that has them is wanted"
                    )
                for layer, statistics in of_layers.items():
                    count = statistics.tokens.double()
                    weighted[layer] = weighted.get(layer, 0) + statistics.load.double() * count
                    tokens[layer] = tokens.get(layer, 0) + count
            loads[name] = {layer: (total / tokens[layer]).tolist() for layer, total in weighted.items()}
    return loads
