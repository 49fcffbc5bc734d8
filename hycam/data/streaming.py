"""Training rows that are read while training goes on, and the few rows that it is measured on.

A source is never held: not in memory, not on disk. What a stream gives up for it: batches by length, bins packed best,
the tasks' sizes (so their shares are given), and counts of rows that were cut or left out.
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from datasets import Dataset
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from hycam.data.cache import in_memory
from hycam.data.collation import Collator
from hycam.data.config import UNIFIED_FIELDS, DataConfig, StreamingConfig, TaskConfig
from hycam.data.sources import TEXT_FEATURES, no_rows, report_blank, stream_task
from hycam.data.splits import PARTS, Instructions, check_parts, part_of
from hycam.data.tokenization import IGNORED_LABEL, batch_tokenizer
from hycam.errors import InputError

_Item = TypeVar("_Item")


class StreamedRows(IterableDataset[dict[str, str]]):
    """The tasks' training rows, `{instruction, input, output}`, without end.

    The next row's task is drawn with the probability `streaming.weights` over their sum. A task's rows come in passes:
    each reads the source from its start, leaves out the rows of validation and test, and draws the next row from a
    buffer of `streaming.shuffle_buffer`, in every pass in another order.

    All draws follow from `seed`, so an iteration gives the same rows in the same order wherever it is made, whatever
    the number of a DataLoader's workers: each reads the whole stream, and they take turns by groups.

    Args:
        tasks: where the rows come from.
        config: with `streaming`.
        seed: of all draws.
        group_size: rows that all processes take in one micro-batch.

    Attributes:
        skipped: how many of the first rows, whole groups, are given as `{}`: a resumed run passes over them.

    Raises:
        InputError: on iterating, where the reading comes to a flaw of a source.
    """

    def __init__(self, tasks: Sequence[TaskConfig], config: DataConfig, seed: int, group_size: int) -> None:
        assert config.streaming is not None
        self.tasks = tasks
        self.fold = config.fold
        self.streaming: StreamingConfig = config.streaming
        self.seed = seed
        self.group_size = group_size
        self.skipped = 0

    def __iter__(self) -> Iterator[dict[str, str]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for number, row in enumerate(self._mixed()):
            if number // self.group_size % workers == worker:
                yield {} if number < self.skipped else row

    def _mixed(self) -> Iterator[dict[str, str]]:
        given = self.streaming.weights or {}
        weights = [given.get(task.name, 1.0) for task in self.tasks]
        streams = [self._passes(task) for task in self.tasks]
        draws = random.Random(f"{self.seed} tasks")
        while True:
            (stream,) = draws.choices(streams, weights)
            yield next(stream)

    def _passes(self, task: TaskConfig) -> Iterator[dict[str, str]]:
        for number in itertools.count():
            draws = random.Random(f"{self.seed} {number} {task.name}")
            yield from _shuffled(self._training_rows(task), self.streaming.shuffle_buffer, draws)

    def _training_rows(self, task: TaskConfig) -> Iterator[dict[str, str]]:
        for row in stream_task(task, {}):
            if part_of(row["instruction"], row["input"], self.fold, task.split_by) == "train":
                yield row


class StreamCollator:
    """Makes model inputs of text rows: a process, or its worker, tokenizes the rows of its own batches alone.

    A row whose prompt leaves no room for a response is left out. Where no row is left, a single token without a target
    stands for them: batches are made of as many rows of the stream in every process.

    Args:
        tokenizer: with eos and pad token.
        config: prompt style, length and where the loss is taken; with `packing`, a batch's rows are concatenated.
        num_embeddings: how many tokens the model knows; None: any.

    Raises:
        InputError: for a tokenizer without eos, pad or (prompt: chat) chat template; on a call, for a token that the
            model doesn't know.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, num_embeddings: int | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.num_embeddings = num_embeddings
        self.tokenize = batch_tokenizer(tokenizer, config)
        assert tokenizer.pad_token_id is not None
        self.collate = Collator(tokenizer.pad_token_id, packing=config.packing)
        self.without_target = {"input_ids": [tokenizer.eos_token_id], "labels": [IGNORED_LABEL]}

    def __call__(self, rows: Sequence[dict[str, str]]) -> dict[str, torch.Tensor]:
        """The inputs of `Collator`; nothing of rows that are passed over, `{}`."""
        if not rows[0]:
            return {}
        columns = {field: [row[field] for row in rows] for field in UNIFIED_FIELDS}
        tokens = [{"input_ids": input_ids, "labels": labels} for input_ids, labels, _ in self.tokenize(columns)]
        most = max((max(row["input_ids"]) for row in tokens), default=0)
        if self.num_embeddings is not None and most >= self.num_embeddings:
            raise InputError(
                f"data: the token {self.tokenizer.convert_ids_to_tokens(most)!r} has id {most}, but the backbone has "
                f"embeddings for {self.num_embeddings} tokens"
            )
        return self.collate(tokens or [self.without_target])


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
    instructions = Instructions()
    for row in stream_task(task, notes):
        part = part_of(row["instruction"], row["input"], fold, task.split_by)
        instructions.add(row["instruction"])
        counts[part] += 1
        if part != "train" and counts[part] <= limit:
            held_out[part].append(row)
        if counts["train"] and all(counts[part] >= limit for part in held_out):
            break
    report_blank(task, notes)
    num_rows = sum(counts.values())
    if not num_rows:
        raise InputError(no_rows(task, notes))
    instructions.warn(task)
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
