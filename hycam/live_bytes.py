"""How many bytes a computation holds, counted operator by operator."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make inside the block while they live, on any device, fake tensors too.

    What an operator takes and gives back inside itself is not seen.

    Args:
        outside: tensors whose storages don't count.

    Attributes:
        live: bytes at this moment.
        peak: the most so far.
    """

    def __init__(self, outside: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in outside)
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size
