"""What a model's own loss must be."""

from typing import Any

import torch
from peft import PeftModel
from torch import nn

from hycam.errors import InputError


def check_loss(model: nn.Module, outputs: Any, loss: torch.Tensor, cross_entropy: torch.Tensor) -> None:
    """Raise `InputError` where a model's own loss is another one than the cross-entropy of the next tokens.

    A mixture of experts may add its router's loss, so what it returns can't be compared.
    """
    if getattr(outputs, "aux_loss", None) is None and not torch.allclose(loss.float(), cross_entropy, rtol=1e-3):
        kind = type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__
        raise InputError(
            f"backbone.name_or_path: {kind} makes a loss of {loss.item():.4f} where the cross-entropy of the next "
            f"tokens is {cross_entropy.item():.4f}, wanted a model that is trained by the latter"
        )
