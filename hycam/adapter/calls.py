"""What the HyCAM layers of a bound model know of its calls, and of this process among those that see other tokens."""

from collections import Counter
from collections.abc import Iterable
from typing import Protocol

import torch

from hycam.adapter.balance import ForwardContext
from hycam.adapter.config import HyCAMConfig
from hycam.adapter.mixed_batch import RowAdapters
from hycam.adapter.threads import Latest, PerThread


class AdaptedLayer(Protocol):
    adapter_configs: dict[str, HyCAMConfig]


class ModelCalls:
    """The calls of one model, shared by its HyCAM layers.

    Args:
        layers: the model's HyCAM layers.
        takes_keywords: whether the model's forward takes keywords that it doesn't name, to hand them on.
        tensor_parallel_size: processes that see the same tokens.

    Attributes:
        row_adapters: what the calls of this thread use for each row, until it is reset.

    Several threads may call the model at once: each sees its own calls.
    """

    def __init__(self, layers: Iterable[AdaptedLayer], *, takes_keywords: bool, tensor_parallel_size: int) -> None:
        self.row_adapters: PerThread[RowAdapters] = PerThread()
        self._layers = list(layers)
        self._hands_keywords_on = takes_keywords
        self._tensor_parallel_size = tensor_parallel_size
        self._last: Latest[ForwardContext] = Latest()
        self._running: PerThread[ForwardContext] = PerThread()

    @property
    def context(self) -> ForwardContext | None:
        """That of the model's last call in this thread; in any, where this one made none."""
        return self._last.get()

    def begin(self, context: ForwardContext) -> None:
        context.row_adapters = self.row_adapters.get()
        self._last.set(context)
        self._running.set(context)

    def end(self) -> None:
        self._running.set(None)

    def context_without_keyword(self) -> ForwardContext:
        """The context for a layer that no keyword reached; a new one for a layer that is called outside its model.

        A model that doesn't hand keywords on to its attentions gets the context of the call that runs, and for a layer
        that runs again in the backward pass that of its last call. So where it checkpoints its layers, it must go
        backward before its next forward, and train in one thread.
        """
        running = self._running.get()
        if running is not None:
            self._hands_keywords_on = False
            return running
        last = self.context
        if self._hands_keywords_on or last is None:
            context = ForwardContext(self.layer_counts())
            context.row_adapters = self.row_adapters.get()
            return context
        return last

    def layer_counts(self) -> dict[str, int]:
        """Adapter name -> number of layers that it adapts."""
        return dict(Counter(name for layer in self._layers for name in layer.adapter_configs))

    def data_parallel_rank(self) -> int:
        """Rank among the processes that see different tokens; those of one tensor-parallel group see the same ones."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank() // self._tensor_parallel_size
        return 0
