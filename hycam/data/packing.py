"""Whole rows in bins of a fixed number of tokens, so that no compute goes into padding."""

import hashlib
import json
from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any

from datasets import Dataset, Features, Value
from datasets import List as ListOf

from hycam.data.cache import RowCache, in_memory
from hycam.data.tokenization import IGNORED_LABEL
from hycam.errors import InputError

_FEATURES = Features({name: ListOf(Value("int32")) for name in ("input_ids", "labels", "position_ids")})
_BATCH = 1000


def pack_dataset(dataset: Dataset, max_length: int, cache: RowCache | None = None) -> Dataset:
    """Bins of at most `max_length` tokens, made of whole rows.

    Best fit, longest rows first: each row goes into the bin where the least room is left over. Deterministic. Bins
    come in the order of their first row, and a bin's rows in the dataset's order.

    Args:
        dataset: columns `input_ids` and `labels`.
        max_length: tokens in a bin.
        cache: keeps the bins on disk, by the rows' tokens; None: they are in memory.

    Returns:
        Columns `input_ids`, `labels` and `position_ids`. Positions restart at 0 with every row; a row's first label is
        -100, so that it is no target of the row before it.

    Raises:
        InputError: for a row longer than `max_length`.
    """
    rows = dataset.with_format(None)
    content, lengths = hashlib.sha256(), []
    for batch in rows.iter(batch_size=_BATCH):
        content.update(json.dumps([batch["input_ids"], batch["labels"]]).encode())
        lengths += [len(ids) for ids in batch["input_ids"]]
    bins = _best_fit(lengths, max_length)

    def make(notes: dict[str, Any]) -> Iterator[dict[str, list[int]]]:
        for members in bins:
            packed = rows[members]
            yield {
                "input_ids": [token for ids in packed["input_ids"] for token in ids],
                "labels": [label for labels in packed["labels"] for label in [IGNORED_LABEL, *labels[1:]]],
                "position_ids": [position for ids in packed["input_ids"] for position in range(len(ids))],
            }

    if cache is None:
        return in_memory(make({}), _FEATURES)
    return cache.rows({"bins of": content.hexdigest(), "max_length": max_length}, _FEATURES, make).dataset


def _best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (room left, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > capacity:
            raise InputError(f"data: row {index} has {length} tokens, wanted at most max_length {capacity} to pack it")
        place = bisect_left(open_bins, (length, -1))
        if place < len(open_bins):
            room, target = open_bins.pop(place)
            bins[target].append(index)
        else:
            room, target = capacity, len(bins)
            bins.append([index])
        if room > length:
            insort(open_bins, (room - length, target))
    return sorted(sorted(members) for members in bins)
