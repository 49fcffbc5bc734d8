"""The lengths of a data set's prompts and responses in tokens (the paper's Table 1)."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hycam.data.cache import RowCache
from hycam.data.config import DataConfig
from hycam.data.tokenization import IGNORED_LABEL, tokenize_dataset

PERCENTILES = (50, 95)


def token_statistics(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig, cache: RowCache | None = None
) -> dict[str, Any]:
    """Rows, their lengths before anything is cut, and what `config.max_length` does to them.

    A prompt counts with the template's text and what the tokenizer puts before it, a response with its end token.

    Args:
        dataset: columns `instruction`, `input`, `output`.
        tokenizer: with eos and pad token.
        config: prompt style and `max_length`.
        cache: keeps the token rows on disk.

    Returns:
        `rows`; `prompt` and `response`, each `{"mean", "p50", "p95", "max"}` in tokens (percentiles interpolated
        linearly); `truncated`: rows whose response is cut; `dropped`: rows whose prompt leaves no room for one.

    Raises:
        InputError: what `tokenize_dataset` refuses.
    """
    whole = dataclasses.replace(config, max_length=sys.maxsize, train_on_prompt=False)
    lengths = [
        (prompt := labels.count(IGNORED_LABEL), len(labels) - prompt)
        for labels in tokenize_dataset(dataset, tokenizer, whole, 0, cache).dataset["labels"]
    ]
    cut = tokenize_dataset(dataset, tokenizer, config, 0, cache)
    prompts, responses = zip(*lengths, strict=True)
    return {
        "rows": len(dataset),
        "prompt": _summary(prompts),
        "response": _summary(responses),
        "truncated": cut.truncated,
        "dropped": cut.dropped,
    }


def _summary(lengths: Sequence[int]) -> dict[str, float]:
    values = np.asarray(lengths)
    percentiles = {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
    return {"mean": float(values.mean()), **percentiles, "max": int(values.max())}
