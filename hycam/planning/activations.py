"""The memory of one micro-batch, counted by running it on fake tensors.

Fake tensors have shapes, dtypes and autograd graphs but no memory, so the forward and backward pass of the very model
that would be trained takes seconds, whatever its family and size.
"""

import contextlib
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class Activations:
    """Bytes beside parameters and gradients.

    Attributes:
        saved: what lives between the forward and the backward pass: what autograd and checkpoints keep.
        peak: the most that lives at once in the two passes, temporary results included. What an operator allocates
            and frees inside itself is not in it.
    """

    saved: int
    peak: int


def trace_activations(model: nn.Module, batch: Mapping[str, Tensor], autocast: torch.dtype | None) -> Activations:
    """Run one training step's forward and backward pass and count what they hold.

    Args:
        model: on fake tensors (under the active `FakeTensorMode`), in training mode; it returns an output with a loss.
        batch: the model's arguments.
        autocast: the dtype that the forward pass runs under, None for no autocast.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        # from the second micro-batch on, a gradient is added to one that is there
        parameter.grad = torch.empty_like(parameter)
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    precision = torch.autocast("cpu", dtype=autocast) if autocast is not None else contextlib.nullcontext()
    with _LiveBytes([*model.parameters(), *model.buffers(), *gradients, *batch.values()]) as live:
        with precision:
            loss = model(**batch, use_cache=False).loss
        saved = live.now
        loss.backward()
    for parameter in trained:
        parameter.grad = None
    return Activations(saved, live.peak)


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators make, for as long as a tensor holds them.

    Args:
        known: tensors whose storages don't count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._seen = WeakIdKeyDictionary({tensor.untyped_storage(): None for tensor in known})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = None
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.now -= size
