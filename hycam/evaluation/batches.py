"""What every measurement shares: the model behind its wrapper, evaluation mode, batches on its device."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hycam.errors import InputError

Collate = Callable[[list[dict[str, Any]]], Mapping[str, torch.Tensor]]


def unwrap(model: nn.Module) -> Any:
    """The model inside DistributedDataParallel, whose own forward may wait for the other ranks."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No gradients, every module in eval mode; each module's own flag comes back on leaving, on error too."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def iterate_batches(
    dataset: Dataset, collator: Collate, batch_size: int, device: torch.device
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Yield (rows, model inputs on `device`).

    The longest rows come first: batches have little padding, and one that is too large fails at once.
    """
    if batch_size < 1:
        raise InputError(f"batch_size: {batch_size} given, at least 1 is wanted")
    lengths = [len(ids) for ids in dataset["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for start in range(0, len(order), batch_size):
        rows = [dataset[row] for row in order[start : start + batch_size]]
        yield len(rows), {name: tensor.to(device) for name, tensor in collator(rows).items()}


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
