"""Whole rows in bins of a fixed number of tokens, so that no compute goes into padding."""

from bisect import bisect_left, insort

from datasets import Dataset

from hycam.data.tokenization import IGNORED_LABEL
from hycam.errors import InputError


def pack_dataset(dataset: Dataset, max_length: int) -> Dataset:
    """Bins of at most `max_length` tokens, made of whole rows.

    Best fit, longest rows first: each row goes into the bin where the least room is left over. Deterministic. Bins
    come in the order of their first row, and a bin's rows in the dataset's order.

    Args:
        dataset: columns `input_ids` and `labels`.
        max_length: tokens in a bin.

    Returns:
        Columns `input_ids`, `labels` and `position_ids`. Positions restart at 0 with every row; a row's first label is
        -100, so that it is no target of the row before it.

    Raises:
        InputError: for a row longer than `max_length`.
    """
    rows = dataset.with_format(None)
    input_ids, labels = rows["input_ids"][:], rows["labels"][:]
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for members in _best_fit([len(ids) for ids in input_ids], max_length):
        columns["input_ids"].append([token for i in members for token in input_ids[i]])
        columns["labels"].append([label for i in members for label in [IGNORED_LABEL, *labels[i][1:]]])
        columns["position_ids"].append([position for i in members for position in range(len(input_ids[i]))])
    return Dataset.from_dict(columns)


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
