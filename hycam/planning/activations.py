"""The memory of one micro-batch, counted by running it on fake tensors.

Fake tensors have shapes, dtypes and autograd graphs but no memory, so the forward and backward pass of the very model
that would be trained takes seconds, whatever its family and size.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hycam.live_bytes import LiveBytes
from hycam.training.loss import loss_by_parts


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
    with LiveBytes([*model.parameters(), *model.buffers(), *gradients, *batch.values()]) as count:
        with precision, loss_by_parts(model):
            loss = model(**batch, use_cache=False).loss
        saved = count.live
        loss.backward()
    for parameter in trained:
        parameter.grad = None
    return Activations(saved, count.peak)
