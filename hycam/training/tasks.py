"""The tasks of a recipe, as text rows per split and as token rows."""

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from hycam.data.cache import RowCache, rows_digest
from hycam.data.config import DataConfig, TaskConfig
from hycam.data.packing import pack_dataset
from hycam.data.prompts import prompt_text
from hycam.data.sampling import mix_tasks
from hycam.data.sources import load_task
from hycam.data.splits import split_dataset
from hycam.data.streaming import read_held_out
from hycam.data.tokenization import encode_prompt, tokenize_dataset
from hycam.errors import InputError
from hycam.training.recipe import EvaluationConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskRows:
    """Text rows of one task per split: columns `instruction`, `input`, `output`; `sha256` is that of all its rows.

    Of a stream these are the rows held out from training alone.
    """

    task_id: int
    splits: Mapping[str, Dataset]
    sha256: str

    def split(self, name: str) -> Dataset:
        """The rows of a split. Raises `InputError` for one that a stream doesn't keep."""
        if name not in self.splits:
            raise InputError(f"data.streaming keeps no {name!r} split, wanted one of {', '.join(self.splits)}")
        return self.splits[name]


def row_cache(config: DataConfig) -> RowCache | None:
    """Where the recipe's rows and tokens lie; None: in memory."""
    return None if config.cache_dir is None else RowCache(config.cache_dir)


def load_rows(tasks: Iterable[TaskConfig], config: DataConfig) -> dict[str, TaskRows]:
    """Every task's rows, read and split before any model is; of streams those held out from training."""
    cache = row_cache(config)
    rows: dict[str, TaskRows] = {}
    for task_id, task in enumerate(tasks):
        if config.streaming is not None:
            held_out = read_held_out(task, config.fold, config.streaming.held_out_rows)
            rows[task.name] = TaskRows(task_id, held_out, rows_digest(concatenate_datasets(list(held_out.values()))))
            continue
        dataset = load_task(task, cache)
        try:
            splits = split_dataset(dataset, config.fold)
        except InputError as error:
            raise InputError(f"tasks: {task.name}: {error}") from error
        rows[task.name] = TaskRows(task_id, splits | {"all": dataset}, rows_digest(dataset))
    return rows


def responses_alone(config: DataConfig) -> DataConfig:
    """The settings for rows that are measured: a perplexity is that of responses, whatever the loss is on."""
    return dataclasses.replace(config, train_on_prompt=False)


def tokenize_split(
    rows: Mapping[str, TaskRows], split: str, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> dict[str, Dataset]:
    """Token rows of one split per task; warns of rows that were cut or left out."""
    cache = row_cache(config)
    tokenized: dict[str, Dataset] = {}
    for name, task in rows.items():
        content = f"{task.sha256} {split} {config.fold}"
        try:
            result = tokenize_dataset(task.split(split), tokenizer, config, task.task_id, cache, content)
        except InputError as error:
            raise InputError(f"tasks: {name}: {split} split: {error}") from error
        if result.truncated or result.dropped:
            logger.warning(
                "%s, %s split: of %d rows, %d were cut to data.max_length=%d and %d left out (prompt too long)",
                name,
                split,
                len(task.splits[split]),
                result.truncated,
                config.max_length,
                result.dropped,
            )
        tokenized[name] = result.dataset
    return tokenized


def training_set(tokenized: Mapping[str, Dataset], config: DataConfig, seed: int) -> Dataset:
    """All tasks' token rows, for the Trainer to shuffle; in bins of `max_length` tokens with packing."""
    rows = mix_tasks(list(tokenized.values()), config.temperature, seed)
    return pack_dataset(rows, config.max_length, row_cache(config)) if config.packing else rows


def prompts_that_fit(
    rows: Mapping[str, TaskRows],
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    backbone: PretrainedConfig,
    data: DataConfig,
    evaluation: EvaluationConfig,
) -> dict[str, dict[str, Any]]:
    """Per task the prompts to answer and the responses to compare with.

    A prompt that with `evaluation.max_new_tokens` exceeds the backbone's positions is left out, and counted.

    Returns:
        `{task: {"prompts": [...], "references": [...], "too_long": int}}`, at most `max_generation_rows` each.

    Raises:
        InputError: a task all of whose prompts are too long.
    """
    positions = getattr(backbone.get_text_config(), "max_position_embeddings", None)
    longest = math.inf if positions is None else positions - evaluation.max_new_tokens
    chosen: dict[str, dict[str, Any]] = {}
    for name, task in rows.items():
        prompts: list[str] = []
        references: list[str] = []
        too_long = 0
        for row in task.splits[split]:
            prompt = prompt_text(row, data.prompt, tokenizer)
            if len(encode_prompt(prompt, tokenizer)) > longest:
                too_long += 1
                continue
            prompts.append(prompt)
            references.append(row["output"])
            if len(prompts) == evaluation.max_generation_rows:
                break
        if not prompts:
            raise InputError(
                f"evaluation.max_new_tokens: {evaluation.max_new_tokens} given, with which no prompt of {name} fits "
                f"into the backbone's {positions} positions"
            )
        chosen[name] = {"prompts": prompts, "references": references, "too_long": too_long}
    return chosen
