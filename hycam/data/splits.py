"""Train, validation and test parts that don't depend on the order of the rows."""

import hashlib
import json
from array import array
from collections.abc import Mapping

from datasets import Dataset

from hycam.data.config import NUM_FOLDS, check_fold
from hycam.errors import InputError

PARTS = ("train", "validation", "test")
_NUM_BINS = 2 * NUM_FOLDS


def split_dataset(dataset: Dataset, fold: int = 0) -> dict[str, Dataset]:
    """The 7:2:1 parts of one of five folds.

    Every row goes to one of ten bins by the SHA-256 of its prompt (instruction and input). Fold f validates on bins 2f
    and 2f + 1, tests on bin 2f + 2 (mod 10) and trains on the rest. Rows with one prompt share a bin, so no
    question that is tested on, or another answer to it, was trained on. Each part keeps the order of the rows.

    Returns:
        `{"train": ..., "validation": ..., "test": ...}`.

    Raises:
        InputError: for a fold outside 0 to 4, and where a part would be empty.
    """
    check_fold(fold)
    indices = {part: array("q") for part in PARTS}
    for index, prompt in enumerate(zip(dataset["instruction"], dataset["input"], strict=True)):
        indices[part_of(*prompt, fold)].append(index)
    check_parts({part: len(rows) for part, rows in indices.items()}, len(dataset), fold)
    return {part: dataset.select(rows) for part, rows in indices.items()}


def part_of(instruction: str, context: str, fold: int) -> str:
    """The part that a row with this prompt belongs to: `train`, `validation` or `test`."""
    held_out = {2 * fold: "validation", 2 * fold + 1: "validation", (2 * fold + 2) % _NUM_BINS: "test"}
    return held_out.get(_bin(instruction, context), "train")


def check_parts(counts: Mapping[str, int], num_rows: int, fold: int) -> None:
    """Raise `InputError` for a part of the fold that is empty."""
    for part, count in counts.items():
        if not count:
            raise InputError(f"fold {fold}: no row of {num_rows} falls to the {part} part, wanted more rows")


def _bin(instruction: str, context: str) -> int:
    content = json.dumps([instruction, context]).encode()
    return int.from_bytes(hashlib.sha256(content).digest(), "big") % _NUM_BINS
