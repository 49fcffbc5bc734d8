"""Training rows that are read while training goes on, and the few rows that it is measured on.

A source is never held: not in memory, not on disk. What a stream gives up for it: batches by length, the tasks' sizes
(so their shares are given), and counts of rows that were cut or left out.
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from datasets import Dataset
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from hycam.data.cache import in_memory
from hycam.data.config import UNIFIED_FIELDS, DataConfig, StreamingConfig, TaskConfig
from hycam.data.packing import pack_rows
from hycam.data.sources import TEXT_FEATURES, no_rows, report_blank, stream_task
from hycam.data.splits import PARTS, check_parts, part_of
from hycam.data.tokenization import batch_tokenizer
from hycam.errors import InputError

_TOKENIZED_AT_ONCE = 100
_PACKED_AT_ONCE = 1000

_Item = TypeVar("_Item")


class StreamedRows(IterableDataset[dict[str, list[int]]]):
    """The tasks' training rows as tokens, without end.

    The next row's task is drawn with the probability `streaming.weights` over their sum. A task's rows come in passes:
    each reads the source from its start, leaves out the rows of validation and test, and draws the next row from a
    buffer of `streaming.shuffle_buffer`, in every pass in another order. With packing, the rows come in bins made of
    1000 rows each.

    All draws follow from `seed`, so an iteration gives the same rows in the same order wherever it is made, whatever
    the number of a DataLoader's workers: they take turns by groups, and each reads and tokenizes all rows.

    Args:
        tasks: where the rows come from.
        tokenizer: with eos and pad token.
        config: with `streaming`.
        seed: of all draws.
        group_size: rows that all processes take in one micro-batch.

    Raises:
        InputError: on iterating, where the reading comes to a flaw of a source, and after a pass without a row whose
            prompt leaves room for a response.
    """

    def __init__(
        self,
        tasks: Sequence[TaskConfig],
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        seed: int,
        group_size: int,
    ) -> None:
        assert config.streaming is not None
        self.tasks = tasks
        self.config = config
        self.streaming: StreamingConfig = config.streaming
        self.seed = seed
        self.group_size = group_size
        self.tokenize = batch_tokenizer(tokenizer, config)

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        rows = self._mixed()
        if self.config.packing:
            windows = _groups(rows, _PACKED_AT_ONCE)
            rows = (row for window in windows for row in pack_rows(window, self.config.max_length))
        for number, group in enumerate(_groups(rows, self.group_size)):
            if number % workers == worker:
                yield from group

    def _mixed(self) -> Iterator[dict[str, list[int]]]:
        weights = self.streaming.weights or {}
        streams = [self._passes(task) for task in self.tasks]
        draws = random.Random(f"{self.seed} tasks")
        while True:
            (stream,) = draws.choices(streams, [weights.get(task.name, 1.0) for task in self.tasks])
            yield next(stream)

    def _passes(self, task: TaskConfig) -> Iterator[dict[str, list[int]]]:
        for number in itertools.count():
            draws = random.Random(f"{self.seed} {number} {task.name}")
            rows = _shuffled(self._training_rows(task), self.streaming.shuffle_buffer, draws)
            found = False
            for group in _groups(rows, _TOKENIZED_AT_ONCE):
                columns = {field: [row[field] for row in group] for field in UNIFIED_FIELDS}
                for input_ids, labels, _ in self.tokenize(columns):
                    found = True
                    yield {"input_ids": input_ids, "labels": labels}
            if not found:
                raise InputError(
                    f"tasks: {task.name}: data.max_length: {self.config.max_length}, wanted more: no row of the stream "
                    "has a prompt that leaves room for a response"
                )

    def _training_rows(self, task: TaskConfig) -> Iterator[dict[str, str]]:
        for row in stream_task(task, {}):
            if part_of(row["instruction"], row["input"], self.config.fold) == "train":
                yield row


def read_held_out(task: TaskConfig, fold: int, limit: int) -> dict[str, Dataset]:
    """The first rows of a task's validation and test parts, the parts of `split_dataset`.

    Args:
        task: where the rows come from; it is read up to the last row that is wanted.
        fold: which of the five folds.
        limit: the most rows of a part.

    Returns:
        `{"validation": ..., "test": ...}`: columns `instruction`, `input`, `output`.

    Raises:
        InputError: as `stream_task`, and where a part, or what is left for training, is empty.
    """
    notes: dict[str, Any] = {}
    held_out: dict[str, list[dict[str, str]]] = {"validation": [], "test": []}
    counts = dict.fromkeys(PARTS, 0)
    for row in stream_task(task, notes):
        part = part_of(row["instruction"], row["input"], fold)
        counts[part] += 1
        if part != "train" and counts[part] <= limit:
            held_out[part].append(row)
        if counts["train"] and all(counts[part] >= limit for part in held_out):
            break
    report_blank(task, notes)
    num_rows = sum(counts.values())
    if not num_rows:
        raise InputError(no_rows(task, notes))
    try:
        check_parts(counts, num_rows, fold)
    except InputError as error:
        raise InputError(f"tasks: {task.name}: {error}") from error
    return {part: in_memory(rows, TEXT_FEATURES) for part, rows in held_out.items()}


def _shuffled(rows: Iterable[_Item], buffer_size: int, draws: random.Random) -> Iterator[_Item]:
    buffer: list[_Item] = []
    for row in rows:
        if len(buffer) < buffer_size:
            buffer.append(row)
            continue
        place = draws.randrange(buffer_size)
        yield buffer[place]
        buffer[place] = row
    draws.shuffle(buffer)
    yield from buffer


def _groups(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group
