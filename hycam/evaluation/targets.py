"""Scores of the tokens that are targets, and of no others.

A vocabulary is so wide that in a small model the logits of one token cost as much as several layers, and those of
prompts and padding are read by nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# So many logits are raised to float32 at once (16 MiB), which bounds the memory beside the model's output.
_LOGITS_AT_ONCE = 1 << 22


class Targets(NamedTuple):
    """The target tokens of a batch.

    Attributes:
        positions: [targets] int64, where each is predicted: places in the flattened [batch * length].
        ids: [targets] int64, the tokens.
    """

    positions: Tensor
    ids: Tensor


def find_targets(labels: Tensor, position_ids: Tensor | None = None) -> Targets:
    """The tokens with a label; each is predicted from the place before it.

    Args:
        labels: [batch, length] int64 in the inputs' order, -100 where a token is no target.
        position_ids: [batch, length] of packed rows, or None. A position 0 begins a sequence: its token has
            nothing before it, so it is no target.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=-100)
    if position_ids is not None:
        following = following.masked_fill(F.pad(position_ids[:, 1:], (0, 1)) == 0, -100)
    following = following.flatten()
    positions = (following != -100).nonzero()[:, 0]
    return Targets(positions, following[positions])


class TargetLogits:
    """Lets a causal language model compute the logits of targets alone; a context manager, which leaves it as it was.

    The model's last projection gets the hidden states of the targets' places. Logits are the same to rounding: what
    follows the projection (scaling, soft-capping) is element-wise.

    Args:
        model: the model itself, or a PEFT model around it.

    Attributes:
        is_possible: whether the model shows its last projection.
    """

    def __init__(self, model: nn.Module) -> None:
        self._projection: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
        self.is_possible = self._projection is not None
        self._positions: Tensor | None = None
        self._shape = torch.Size()

    def __enter__(self) -> Self:
        if self._projection is not None:
            self._handle = self._projection.register_forward_pre_hook(self._narrow)
        return self

    def __exit__(self, *error: object) -> None:
        if self._projection is not None:
            self._handle.remove()

    @contextmanager
    def at(self, positions: Tensor, shape: torch.Size) -> Iterator[None]:
        """While this lasts, the model's logits are [1, positions, vocabulary], at places in the flattened batch.

        Args:
            positions: [targets] int64.
            shape: [batch, length] of the inputs.
        """
        self._positions, self._shape = positions, shape
        try:
            yield
        finally:
            self._positions = None

    def _narrow(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._positions is None:
            return None
        hidden, *others = args
        return (at_inputs(hidden, self._shape)[self._positions.to(hidden.device)][None], *others)


def at_inputs(values: Tensor, shape: torch.Size) -> Tensor:
    """[batch * length, d] of a model's `values` at its inputs [batch, length]; virtual tokens of PEFT's come before."""
    return values.reshape(shape[0], -1, values.shape[-1])[:, -shape[1] :].flatten(0, 1)


def target_nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihood of every target given the tokens before it.

    For the gradients nothing as wide as the vocabulary is kept but the logits.

    Args:
        logits: [targets, vocabulary], any float dtype.
        ids: [targets] int64, -100 where none is wanted.

    Returns:
        [targets] in the logits' dtype, float32 at least; 0 where none is wanted.
    """
    return cast("Tensor", _TargetNLL.apply(logits, ids))


class _TargetNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(logits, ids)
        parts = _in_parts(logits, ids)
        return torch.cat([F.cross_entropy(_raised(part), target, reduction="none") for part, target in parts])

    @staticmethod
    def backward(ctx: Any, nll_grad: Tensor) -> tuple[Tensor, None]:
        """d nll / dz = softmax(z) - onehot(target)."""
        logits, ids = ctx.saved_tensors
        weights = nll_grad.where(ids != -100, 0)[:, None]
        grad = torch.empty_like(logits)
        for part_grad, part, target, weight in _in_parts(grad, logits, ids.clamp(min=0), weights):
            gaps = torch.softmax(part, -1, dtype=nll_grad.dtype)
            gaps[torch.arange(len(target), device=target.device), target] -= 1
            part_grad.copy_(gaps.mul_(weight))
        return grad, None


def _in_parts(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Of each tensor [targets, ...] as many targets at once as `_LOGITS_AT_ONCE` allows."""
    targets = max(1, _LOGITS_AT_ONCE // logits.shape[-1])
    return zip(*(tensor.split(targets) for tensor in (logits, *others)), strict=True)


def _raised(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def uniform_gaps(logits: Tensor, ids: Tensor) -> Tensor:
    """Uniform minus own negative log-likelihood of every target: z_target - mean(z), for its logits z.

    Args:
        logits: [targets, vocabulary], any float dtype.
        ids: [targets] int64.

    Returns:
        [targets] in the logits' dtype, float32 at least.
    """
    logits = _raised(logits)
    return logits.gather(-1, ids[:, None])[:, 0] - logits.mean(-1)
