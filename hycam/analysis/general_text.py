"""Perplexity on general text: what an adapted model has forgotten of what its backbone knew."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from hycam.data.collation import Collator
from hycam.data.tokenization import encode_prompt
from hycam.errors import InputError
from hycam.evaluation.perplexity import evaluate_perplexity


def text_windows(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Token rows of every text, cut into windows of at most `max_length` tokens that don't overlap.

    A text begins with what the tokenizer puts before one (mostly BOS). The first token of a window has nothing before
    it and is no target, so a window of one token is left out.

    Returns:
        Columns `input_ids` and `labels`, the same lists.

    Raises:
        InputError: `max_length` below 2, or no text of two tokens.
    """
    if max_length < 2:
        raise InputError(f"max_length: {max_length} given, at least 2 is wanted")
    windows = [
        ids[start : start + max_length]
        for ids in (encode_prompt(text, tokenizer) for text in texts)
        for start in range(0, len(ids) - 1, max_length)
    ]
    if not windows:
        raise InputError(f"texts: {len(texts)} given without one of two tokens, at least one is wanted")
    return Dataset.from_dict({"input_ids": windows, "labels": windows})


def text_perplexity(model: nn.Module, windows: Dataset, pad_token_id: int, *, batch_size: int = 8) -> dict[str, Any]:
    """exp(total negative log-likelihood / targets) over all windows.

    Args:
        model: a causal language model, adapted or not.
        windows: what `text_windows` returns.

    Returns:
        `{"nll", "tokens", "perplexity"}`; `nll` is the sum over the targets, in nats.
    """
    return evaluate_perplexity(model, {"text": windows}, Collator(pad_token_id), batch_size=batch_size)["overall"]
