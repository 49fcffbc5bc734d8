"""The tasks of a recipe, as text rows per split and as token rows."""

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from hycam.data.cache import RowCache, rows_digest
from hycam.data.config import DataConfig, TaskConfig
from hycam.data.packing import pack_dataset
from hycam.data.sampling import mix_tasks
from hycam.data.sources import load_task
from hycam.data.special_tokens import SpecialTokens
from hycam.data.splits import Instructions, never_tested, split_dataset
from hycam.data.streaming import read_held_out
from hycam.data.tokenization import encode_row_prompt, tokenize_dataset
from hycam.errors import InputError
from hycam.training.backbone import check_ids, num_embeddings
from hycam.training.recipe import EvaluationConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskRows:
    """Text rows of one task per split: columns `instruction`, `input`, `output`.

    Of a stream these are the rows held out from training alone. The split `untested` has the validation rows that no
    fold tests; it may be empty.

    Attributes:
        sha256: of all its rows.
        held_out: SHA-256 of the rows that are validated and tested on, which tells one way of splitting from another.
    """

    task_id: int
    splits: Mapping[str, Dataset]
    sha256: str
    held_out: str

    def fingerprint(self) -> dict[str, Any]:
        """What a run's record has of the rows, to tell them from any others."""
        rows = {split: len(dataset) for split, dataset in self.splits.items()}
        return {"rows": rows, "sha256": self.sha256, "held_out": self.held_out}

    def split(self, name: str) -> Dataset:
        """The rows of a split. Raises `InputError` for one that a stream doesn't keep."""
        if name not in self.splits:
            raise InputError(f"data.streaming keeps no {name!r} split, wanted one of {', '.join(self.splits)}")
        return self.splits[name]


def row_cache(config: DataConfig) -> RowCache | None:
    """Where the recipe's rows and tokens lie; None: in memory."""
    return None if config.cache_dir is None else RowCache(config.cache_dir)


def load_rows(tasks: Iterable[TaskConfig], config: DataConfig, *, whole: bool = False) -> dict[str, TaskRows]:
    """Every task's rows, read and split before any model is; of streams those held out from training.

    Args:
        whole: don't split them: `all` is the one split, which needs no row in each part.
    """
    cache = row_cache(config)
    rows: dict[str, TaskRows] = {}
    for task_id, task in enumerate(tasks):
        if config.streaming is not None:
            splits = read_held_out(task, config.fold, config.streaming.held_out_rows)
            sha256 = held_out = _held_out_digest(splits)
        else:
            dataset = load_task(task, cache)
            if whole:
                digest = rows_digest(dataset)
                rows[task.name] = TaskRows(task_id, {"all": dataset}, digest, digest)
                continue
            splits = _split(dataset, task, config.fold) | {"all": dataset}
            sha256, held_out = rows_digest(dataset), _held_out_digest(splits)
        untested = {"untested": never_tested(splits["validation"], task.split_by)}
        rows[task.name] = TaskRows(task_id, splits | untested, sha256, held_out)
    return rows


def _split(dataset: Dataset, task: TaskConfig, fold: int) -> dict[str, Dataset]:
    instructions = Instructions()
    for instruction in dataset["instruction"]:
        instructions.add(instruction)
    instructions.warn(task)
    try:
        return split_dataset(dataset, fold, task.split_by)
    except InputError as error:
        raise InputError(f"tasks: {task.name}: {error}") from error


def _held_out_digest(splits: Mapping[str, Dataset]) -> str:
    return rows_digest(concatenate_datasets([splits["validation"], splits["test"]]))


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
        content = f"{task.sha256} {split} {task.held_out}"
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


def check_tokens(
    rows: Mapping[str, TaskRows],
    tokenized: Iterable[Mapping[str, Dataset]],
    tokenizer: PreTrainedTokenizerBase,
    backbone: PretrainedConfig,
    name: str,
) -> None:
    """Raise `InputError` for a token of the rows, or the pad token, that the backbone has no embedding for.

    Args:
        tokenized: the token rows that are used, per task.
        backbone, name: its configuration, and what it is called in the message.
    """
    assert tokenizer.pad_token_id is not None
    check_ids({f"backbone.pad_token: {tokenizer.pad_token!r}": tokenizer.pad_token_id}, backbone, name)
    for of_tasks in tokenized:
        for task, dataset in of_tasks.items():
            most = pc.max(pc.list_flatten(dataset.data.column("input_ids"))).as_py()
            check_ids({f"tasks: {task}: the token {tokenizer.convert_ids_to_tokens(most)!r}": most}, backbone, name)
    # a special token in a row is read as its text; one that was added for the rows is meant to have an embedding
    special = SpecialTokens(tokenizer).ids
    beyond = {token: number for token, number in special.items() if number >= num_embeddings(backbone)}
    for task, of_task in rows.items() if beyond else ():
        for split in of_task.splits.values():
            for row in split:
                assert isinstance(row, dict)
                found = {token: number for token, number in beyond.items() if any(token in row[f] for f in row)}
                check_ids(
                    {f"tasks: {task}: the token {token!r}": number for token, number in found.items()}, backbone, name
                )


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
    """Per task the prompts to answer, as token ids, and the responses to compare with.

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
        prompts: list[list[int]] = []
        references: list[str] = []
        too_long = 0
        for row in task.splits[split]:
            prompt = encode_row_prompt(row, data.prompt, tokenizer)
            if len(prompt) > longest:
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
