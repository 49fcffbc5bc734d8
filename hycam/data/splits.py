"""Train, validation and test parts that don't depend on the order of the rows."""

import hashlib
import json
import logging
from array import array
from collections import Counter
from collections.abc import Mapping

from datasets import Dataset

from hycam.data.config import NUM_FOLDS, SplitBy, TaskConfig, check_fold
from hycam.errors import InputError

logger = logging.getLogger(__name__)

PARTS = ("train", "validation", "test")
_NUM_BINS = 2 * NUM_FOLDS
# Of a task's rows: half a bin, which one group of rows then fills by chance in one fold and leaves empty in the others.
_LARGE_SHARE = 1 / (2 * _NUM_BINS)
_FEWEST_ROWS = 100  # of fewer, a few rows are a large share


def split_dataset(dataset: Dataset, fold: int = 0, split_by: SplitBy = "instruction") -> dict[str, Dataset]:
    """The 7:2:1 parts of one of five folds.

    Every row goes to one of ten bins by a SHA-256, that of its instruction. Fold f validates on bins 2f and 2f + 1,
    tests on bin 2f + 2 (mod 10) and trains on the rest. Rows with one instruction, in any case and spacing, share a
    bin, so no question that is tested on was trained on, whatever its input or answer was there. Each part keeps the
    order of the rows.

    Args:
        dataset: columns `instruction` and `input`.
        fold: 0 to 4.
        split_by: `prompt`: the bin follows from instruction and input, for one instruction over many inputs.

    Returns:
        `{"train": ..., "validation": ..., "test": ...}`.

    Raises:
        InputError: for a fold outside 0 to 4, and where a part would be empty.
    """
    check_fold(fold)
    indices = {part: array("q") for part in PARTS}
    for index, prompt in enumerate(zip(dataset["instruction"], dataset["input"], strict=True)):
        indices[part_of(*prompt, fold, split_by)].append(index)
    check_parts({part: len(rows) for part, rows in indices.items()}, len(dataset), fold)
    return {part: dataset.select(rows) for part, rows in indices.items()}


def part_of(instruction: str, context: str, fold: int, split_by: SplitBy = "instruction") -> str:
    """The part that a row with this prompt belongs to: `train`, `validation` or `test`."""
    held_out = {2 * fold: "validation", 2 * fold + 1: "validation", (2 * fold + 2) % _NUM_BINS: "test"}
    return held_out.get(_bin(instruction, context, split_by), "train")


def never_tested(dataset: Dataset, split_by: SplitBy) -> Dataset:
    """The rows of odd bins, which no fold tests: what is chosen on them has seen no test row of any fold."""
    prompts = zip(dataset["instruction"], dataset["input"], strict=True)
    return dataset.select([index for index, prompt in enumerate(prompts) if _bin(*prompt, split_by) % 2])


def _bin(instruction: str, context: str, split_by: SplitBy) -> int:
    return int.from_bytes(hashlib.sha256(_group(instruction, context, split_by)).digest(), "big") % _NUM_BINS


def _group(instruction: str, context: str, split_by: SplitBy) -> bytes:
    """What rows that must not part have in common."""
    texts = [instruction] if split_by == "instruction" else [instruction, context]
    return json.dumps([" ".join(text.casefold().split()) for text in texts]).encode()


def check_parts(counts: Mapping[str, int], num_rows: int, fold: int) -> None:
    """Raise `InputError` for a part of the fold that is empty."""
    for part, count in counts.items():
        if not count:
            raise InputError(
                f"fold {fold}: no row of {num_rows} falls to the {part} part, wanted more rows: of ten bins of "
                "instructions seven train, two validate and one tests"
            )


class Instructions:
    """Counts rows by their instruction, to find one that heads so many that ten bins can't be even."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, instruction: str) -> None:
        # a stream's rows are not kept, so neither are their texts
        self._counts[hash(_group(instruction, "", "instruction"))] += 1

    def warn(self, task: TaskConfig) -> None:
        """Warn where one instruction's rows make a fold's parts uneven."""
        total = self._counts.total()
        if task.split_by != "instruction" or total < _FEWEST_ROWS:
            return
        ((_, most),) = self._counts.most_common(1)
        if most > _LARGE_SHARE * total:
            logger.warning(
                "%s: one instruction heads %d of %d rows (%.0f%%), which all fall to one part: the task's split_by: "
                "prompt parts them by their inputs; but then a question that comes with several inputs is parted too",
                task.name,
                most,
                total,
                100 * most / total,
            )
