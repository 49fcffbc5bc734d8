"""What a user says about the data: one `TaskConfig` per task, one `DataConfig` for all of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from hycam.data.formats import KNOWN_SETS
from hycam.errors import InputError

NUM_FOLDS = 5
UNIFIED_FIELDS = ("instruction", "input", "output")
PROMPT_STYLES = ("alpaca", "chat")
SplitBy = Literal["instruction", "prompt"]
_MOST_WEIGHT = 1e6


@dataclass
class TaskConfig:
    """One task and where its rows come from.

    Attributes:
        name: the task's name in every table and plot.
        source: a known set (`auto_cot`, `icliniq`, `dolly`, `code_alpaca`, `webgpt`), a synthetic task
            (`synthetic_*`), a local `.json`, `.jsonl`, `.parquet`, `.csv` or `.tsv` file (lines and tables also as
            `.gz` or `.zst`), or any other set's hub id (`owner/name`). Defaults to `name`.
        fields: unified field -> native field, dotted for a nested one (`question.full_text`, `turns.0.value`).
            `instruction` and `output` are needed; without `input` the rows have none.
        split: the split of a hub set, with any slice that `datasets` reads, as in `train[:1000]`; a stream takes none.
        max_rows: keep the first so many usable rows; for a synthetic task, its number of rows.
        format: the known set whose native fields the source has. Without `fields` and `format` they are those of the
            known set called `name`, else the unified names themselves.
        subset: the configuration of a hub set that has several.
        revision: the branch, tag or commit of a hub set.
        split_by: which rows stay together in training, validation or test: those with one `instruction`, or with one
            `prompt` (instruction and input), for an instruction that heads very many rows.
        domain: what the rows are about, for the table of the data; None: a known set's own.

    Raises:
        InputError: for a value of the wrong type or out of range.
    """

    name: str
    source: str | None = None
    fields: Mapping[str, str] | None = None
    split: str = "train"
    max_rows: int | None = None
    format: str | None = None
    subset: str | None = None
    revision: str | None = None
    split_by: SplitBy = "instruction"
    domain: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise InputError(f"name: {self.name!r}, wanted the task's name")
        for option in ("source", "split", "format", "subset", "revision", "domain"):
            value = getattr(self, option)
            absent = value is None and option != "split"
            if not absent and not (isinstance(value, str) and value):
                raise InputError(f"{option}: {value!r}, wanted text")
        if self.format is not None and self.format not in KNOWN_SETS:
            raise InputError(f"format: {self.format!r}, wanted one of {', '.join(KNOWN_SETS)}")
        if self.split_by not in get_args(SplitBy):
            raise InputError(f"split_by: {self.split_by!r}, wanted one of {', '.join(get_args(SplitBy))}")
        if self.max_rows is not None and not (_is_int(self.max_rows) and self.max_rows >= 1):
            raise InputError(f"max_rows: {self.max_rows!r}, wanted an integer of 1 or more")
        if self.fields is not None:
            self._check_fields()

    def _check_fields(self) -> None:
        if self.format is not None:
            raise InputError("fields: given together with format, wanted one of them")
        if not isinstance(self.fields, Mapping):
            raise InputError(f"fields: {self.fields!r}, wanted a mapping such as {{instruction: question}}")
        for unified, native in self.fields.items():
            if unified not in UNIFIED_FIELDS:
                raise InputError(f"fields: {unified!r}, wanted one of {', '.join(UNIFIED_FIELDS)}")
            if not isinstance(native, str) or not native:
                raise InputError(f"fields: {unified}: {native!r}, wanted the name of a native field")
        for unified in ("instruction", "output"):
            if unified not in self.fields:
                raise InputError(f"fields: no {unified!r}, wanted the native field that holds it")


@dataclass
class StreamingConfig:
    """Training rows that are read while training goes on, and never all at once.

    Attributes:
        shuffle_buffer: rows of a task among which the next one is drawn, kept as text in memory; 1 keeps the source's
            order.
        held_out_rows: the most rows of a task to validate on, and the most to test on: the first of its parts.
        weights: task name -> its share of the training rows, relative to the others'; 1 for a task not named.

    Raises:
        InputError: for a value of the wrong type or out of range.
    """

    shuffle_buffer: int = 10_000
    held_out_rows: int = 1000
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for option in ("shuffle_buffer", "held_out_rows"):
            value = getattr(self, option)
            if not (_is_int(value) and value >= 1):
                raise InputError(f"{option}: {value!r}, wanted an integer of 1 or more")
        if self.weights is not None and not isinstance(self.weights, Mapping):
            raise InputError(f"weights: {self.weights!r}, wanted a mapping from tasks' names to numbers")
        for name, weight in (self.weights or {}).items():
            if not isinstance(name, str):
                raise InputError(f"weights: {name!r}, wanted a task's name, in quotes where YAML reads it otherwise")
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not (is_number and 0 < weight <= _MOST_WEIGHT):
                raise InputError(f"weights: {name}: {weight!r}, wanted a number above 0, at most {_MOST_WEIGHT:g}")


@dataclass
class DataConfig:
    """How rows become tokens.

    Attributes:
        max_length: the most tokens in a row, prompt and end token included, and in a packed bin.
        prompt: `alpaca` (the Stanford-Alpaca template) or `chat` (the tokenizer's own chat template).
        train_on_prompt: take the loss on the prompt's tokens too.
        packing: fill bins of `max_length` tokens with whole rows instead of padding; with streaming, concatenate the
            rows of a micro-batch.
        fold: which of the five folds is validated and tested on; see `split_dataset`.
        temperature: of the tasks' shares in training, 1 or more: 1 takes every row once an epoch; the higher, the more
            equal the tasks' shares; see `mix_tasks`.
        cache_dir: folder for rows and tokens on disk, which are memory-mapped and used again wherever rows, tokenizer
            and these settings are the same; None keeps them in memory.
        streaming: read training rows while training goes on; None reads all rows before.

    Raises:
        InputError: for a value of the wrong type or out of range.
    """

    max_length: int = 1200
    prompt: Literal["alpaca", "chat"] = "alpaca"
    train_on_prompt: bool = False
    packing: bool = False
    fold: int = 0
    temperature: float = 1.0
    cache_dir: str | None = None
    streaming: StreamingConfig | None = None

    def __post_init__(self) -> None:
        if not (_is_int(self.max_length) and self.max_length >= 3):
            raise InputError(f"max_length: {self.max_length!r}, wanted an integer of 3 or more")
        check_prompt_style(self.prompt)
        for option in ("train_on_prompt", "packing"):
            if not isinstance(getattr(self, option), bool):
                raise InputError(f"{option}: {getattr(self, option)!r}, wanted true or false")
        check_fold(self.fold)
        if not (isinstance(self.temperature, int | float) and 1 <= self.temperature < math.inf):
            raise InputError(f"temperature: {self.temperature!r}, wanted a number of 1 or more")
        if self.cache_dir is not None and not (isinstance(self.cache_dir, str) and self.cache_dir):
            raise InputError(f"cache_dir: {self.cache_dir!r}, wanted a folder, or null to keep rows in memory")
        if self.streaming is not None:
            if self.temperature != 1:
                raise InputError(
                    f"temperature: {self.temperature!r}, wanted 1 with streaming, which doesn't know how many rows a "
                    "task has: streaming.weights gives the tasks' shares"
                )
            if self.cache_dir is not None:
                raise InputError(f"cache_dir: {self.cache_dir!r}, wanted null with streaming, which keeps no rows")


def check_prompt_style(style: object) -> None:
    if style not in PROMPT_STYLES:
        raise InputError(f"prompt: {style!r}, wanted one of {', '.join(PROMPT_STYLES)}")


def check_fold(fold: object) -> None:
    if not (_is_int(fold) and fold in range(NUM_FOLDS)):
        raise InputError(f"fold: {fold!r}, wanted an integer from 0 to {NUM_FOLDS - 1}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
