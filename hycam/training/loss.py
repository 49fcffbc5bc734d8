"""What a model's own loss must be, and how it is made."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from hycam.errors import InputError
from hycam.evaluation.batches import base_model
from hycam.evaluation.targets import target_nll


@contextmanager
def loss_by_parts(model: nn.Module) -> Iterator[None]:
    """While this lasts, the model's own loss raises a part of its logits to float32 at a time, not all.

    A model whose loss is not the one that transformers gives causal language models keeps its own.
    """
    base: Any = base_model(model)
    if getattr(base, "loss_function", None) is not ForCausalLMLoss:
        yield
        return
    base.loss_function = causal_lm_loss
    try:
        yield
    finally:
        base.loss_function = ForCausalLMLoss


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The loss that transformers gives causal language models, with its arguments, of `target_nll`.

    Args:
        logits: [batch, length, vocabulary].
        labels: [batch, length] in the inputs' order, `ignore_index` where a token is no target.
        vocab_size: of the logits.
        num_items_in_batch: the targets of all micro-batches of a step, by which to divide, a tensor or a number;
            None: by this one's.
        ignore_index: see `labels`.
        shift_labels: [batch, length], each at the place that predicts it, instead of `labels`.
        **kwargs: what other losses take.

    Returns:
        A scalar in the logits' dtype, float32 at least.
    """
    if torch.compiler.is_compiling():  # it fuses the passes itself, and would compile anew for every number of parts
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    ids = shift_labels.flatten().to(logits.device)
    ids = ids.masked_fill(ids == ignore_index, -100)
    total = target_nll(logits.reshape(-1, vocab_size), ids).sum()
    items = (ids != -100).sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
    return total / items.to(total.device)


def check_loss(model: nn.Module, outputs: Any, loss: torch.Tensor, cross_entropy: torch.Tensor) -> None:
    """Raise `InputError` where a model's own loss is another one than the cross-entropy of the next tokens.

    A mixture of experts may add its router's loss, so what it returns can't be compared.
    """
    if getattr(outputs, "aux_loss", None) is None and not torch.allclose(loss.float(), cross_entropy, rtol=1e-3):
        kind = type(base_model(model)).__name__
        raise InputError(
            f"backbone.name_or_path: {kind} makes a loss of {loss.item():.4f} where the cross-entropy of the next "
            f"tokens is {cross_entropy.item():.4f}, wanted a model that is trained by the latter"
        )
