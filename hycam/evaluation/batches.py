"""What every measurement shares: the model behind its wrapper, evaluation mode, batches on its device."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hycam.errors import InputError
from hycam.evaluation.rope import group_by_frequencies

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
    dataset: Dataset, collator: Collate, batch_size: int, model: nn.Module, *, rank: int = 0, processes: int = 1
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Yield (rows, inputs of `model` where it computes).

    The longest rows come first: batches have little padding, and one that is too large fails at once. The rows of a
    batch have the frequencies of rotary embeddings that each has alone.

    Of several processes each takes its batch of every round, and the rows are those of the whole round. A process that
    the last round has no batch for gets the round's first with all labels -100: a forward of a model that is in parts
    needs every process.
    """
    if batch_size < 1:
        raise InputError(f"batch_size: {batch_size} given, at least 1 is wanted")
    device = device_of(model)
    lengths = [len(ids) for ids in dataset["input_ids"]]
    for group in group_by_frequencies(lengths, getattr(model, "config", None)):
        for start in range(0, len(group.rows), batch_size * processes):
            turn = group.rows[start : start + batch_size * processes]
            own = turn[rank * batch_size : (rank + 1) * batch_size]
            batch = dict(collator([dataset[row] for row in own or turn[:batch_size]]))
            if not own:
                batch["labels"] = torch.full_like(batch["labels"], -100)
            yield len(turn), {name: tensor.to(device) for name, tensor in batch.items()}


def place_in_group() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without a process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def base_model(model: nn.Module) -> nn.Module:
    """The model itself, without the PEFT model around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes: under FSDP2 with offload its parameters lie elsewhere, on the host."""
    parameter = next(model.parameters())
    return torch.device(parameter.device_mesh.device_type) if isinstance(parameter, DTensor) else parameter.device
