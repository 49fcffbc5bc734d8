"""From text to token ids and labels.

A row is `prefix, prompt, response`: the prefix is what the tokenizer puts before a text (mostly BOS, once; a chat
template has its own, or none), the response ends in the token that closes an answer (`hycam.data.closing`), unless the
row is cut. A special token in a row's text is text.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from datasets import Dataset, Features, Value
from datasets import List as ListOf
from transformers import PreTrainedTokenizerBase

from hycam.data.cache import RowCache, digest, file_digest, in_memory, rows_digest
from hycam.data.closing import Closing, closing_of
from hycam.data.config import UNIFIED_FIELDS, DataConfig
from hycam.data.prompts import prompt_text
from hycam.data.special_tokens import Quoted, SpecialTokens, encode_plain
from hycam.errors import InputError

IGNORED_LABEL = -100
_BATCH = 1000

_FEATURES = Features(
    {
        "input_ids": ListOf(Value("int32")),
        "labels": ListOf(Value("int32")),
        "task_id": Value("int32"),
    }
)


@dataclass(frozen=True)
class TokenizedTask:
    """Token rows of one task.

    Attributes:
        dataset: columns `input_ids` and `labels` (lists of one length, -100 where no loss is taken) and `task_id`.
        truncated: rows whose response was cut.
        dropped: rows left out, whose prompt leaves no room for a response.
    """

    dataset: Dataset
    truncated: int
    dropped: int


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError unless the tokenizer has an eos token and a pad token."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise InputError(f"tokenizer: {name}: no eos token, wanted one: it ends every response")
    if tokenizer.pad_token_id is None:
        raise InputError(
            f"tokenizer: {name}: no pad token, wanted one: set tokenizer.pad_token = tokenizer.eos_token (padding is "
            f"masked, so eos serves), or backbone.pad_token: {tokenizer.eos_token!r} in a recipe"
        )


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a whole prompt, in which special tokens are meant as such.

    What the tokenizer puts before a text (mostly BOS) stands there once, also where the text brings it along; what it
    puts after a text (eos, for some) is left out: the response follows.
    """
    (ids,) = _encode_marked([prompt], tokenizer)
    prefix = _prefix_ids(tokenizer)
    return ids if ids[: len(prefix)] == prefix else prefix + ids


def encode_row_prompt(row: Mapping[str, str], style: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the prompt of a row (`instruction`, `input`), the same in training and in generation.

    Raises:
        InputError: as `prompt_text`.
    """
    encoder = _RowEncoder(tokenizer, style)
    (quoted,) = encoder.quotes([row])
    text = prompt_text(row if quoted is None else quoted.row, style, tokenizer)
    return encoder.encode(text, quoted)


def tokenize_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    data_config: DataConfig,
    task_id: int,
    cache: RowCache | None = None,
    content: str | None = None,
) -> TokenizedTask:
    """Token rows of at most `max_length`, with the loss on the response (or, as an option, on all tokens).

    A row over `max_length` loses the end of its response with the token that closes it: an end in mid-sentence would be
    learnt and scored. A row whose prompt leaves no room for a response is dropped. Both are counted.

    Args:
        dataset: columns `instruction`, `input`, `output`.
        tokenizer: with eos and pad token.
        data_config: prompt style, length and where the loss is taken.
        task_id: written into every row, for reports by task.
        cache: keeps the token rows on disk, by rows, tokenizer, what its chat template renders today, and
            `data_config`; None: they are in memory.
        content: `rows_digest` of the dataset where that is known; it is computed where a cache needs it.

    Raises:
        InputError: for a tokenizer without eos, pad or (prompt: chat) chat template, a dataset without the three
            columns, and where no row is left.
    """
    for column in UNIFIED_FIELDS:
        if column not in dataset.column_names:
            raise InputError(f"dataset: no column {column!r} in {dataset.column_names}, wanted {UNIFIED_FIELDS}")
    tokenize = batch_tokenizer(tokenizer, data_config)

    def make(notes: dict[str, Any]) -> Iterator[dict[str, Any]]:
        notes["truncated"] = 0
        for batch in dataset.iter(batch_size=_BATCH):
            assert isinstance(batch, dict)
            for input_ids, labels, truncated in tokenize(batch):
                notes["truncated"] += truncated
                yield {"input_ids": input_ids, "labels": labels, "task_id": task_id}

    if cache is None:
        notes: dict[str, Any] = {}
        tokenized = in_memory(make(notes), _FEATURES)
    else:
        settings = {name: getattr(data_config, name) for name in ("max_length", "prompt", "train_on_prompt")}
        key: dict[str, Any] = {
            "tokens of": content or rows_digest(dataset),
            "tokenizer": tokenizer_digest(tokenizer),
            "rendered": closing_of(data_config.prompt, tokenizer).probe,
        }
        cached = cache.rows(key | settings | {"task_id": task_id}, _FEATURES, make)
        tokenized, notes = cached.dataset, cached.notes
    if not len(tokenized):
        raise InputError(
            f"data: max_length: {data_config.max_length}, wanted more: no row of {len(dataset)} has a prompt that "
            "leaves room for a response"
        )
    return TokenizedTask(tokenized, notes["truncated"], dropped=len(dataset) - len(tokenized))


def batch_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Callable[[Mapping[str, list[str]]], Iterator[tuple[list[int], list[int], bool]]]:
    """What makes tokens of a batch of text rows, given as columns `instruction`, `input`, `output`.

    It gives, of each row that has room for a response: input ids, labels, and whether the response was cut.

    Raises:
        InputError: for a tokenizer without eos, pad or (prompt: chat) chat template.
    """
    check_tokenizer(tokenizer)
    closing = closing_of(config.prompt, tokenizer)
    return partial(_tokenize_batch, config=config, encoder=_RowEncoder(tokenizer, config.prompt), closing=closing)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that makes the tokenizer's output: the files that it saves, and the code's versions."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: file_digest(path) for path in sorted(Path(folder).iterdir())}
    versions = [transformers.__version__, tokenizers.__version__]
    return digest([type(tokenizer).__name__, versions, files])


class _RowEncoder:
    """Encodes what a prompt style makes of rows.

    Alpaca's texts have no special token, whatever the row has, and what the tokenizer puts before a text comes before
    them. A chat template writes its special tokens itself, at the beginning too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: str) -> None:
        self.tokenizer = tokenizer
        self.style = style
        self.special = SpecialTokens(tokenizer)
        self.prefix = _prefix_ids(tokenizer) if style == "alpaca" else []

    def quotes(self, rows: Sequence[Mapping[str, str]]) -> list[Quoted | None]:
        """Each row with its special tokens held apart, None where that isn't needed."""
        return [self.special.quoted(row) if self.style == "chat" else None for row in rows]

    def encode(self, text: str, quoted: Quoted | None, *, begins: bool = True) -> list[int]:
        """The ids of one text; `begins`: what comes before a text comes before it."""
        (ids,) = self.encode_all([text], [quoted])
        return ids if begins else ids[len(self.prefix) :]

    def encode_all(self, texts: list[str], quotes: list[Quoted | None]) -> list[list[int]]:
        if self.style == "alpaca":
            return [self.prefix + ids for ids in encode_plain(texts, self.tokenizer)]
        encoded = zip(_encode_marked(texts, self.tokenizer), texts, quotes, strict=True)
        return [ids if quoted is None else quoted.encode(text) for ids, text, quoted in encoded]


def _tokenize_batch(
    batch: Mapping[str, list[str]], config: DataConfig, encoder: _RowEncoder, closing: Closing
) -> Iterator[tuple[list[int], list[int], bool]]:
    for prompt, response in _encode_rows(batch, encoder, closing):
        room = config.max_length - len(prompt)
        if room < 1:
            continue
        truncated = len(response) > room
        input_ids = prompt + response[:room]
        labels = input_ids if config.train_on_prompt else [IGNORED_LABEL] * len(prompt) + response[:room]
        yield input_ids, labels, truncated


def _encode_rows(
    batch: Mapping[str, list[str]], encoder: _RowEncoder, closing: Closing
) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt ids as in generation, and the response's ids with the token that closes it.

    The response is read in the prompt's context where the border allows it: SentencePiece puts a blank before a text of
    its own, so a response tokenised alone would gain one. Where a token would reach over the border between prompt and
    response, the response is tokenised alone all the same.
    """
    tokenizer, style = encoder.tokenizer, encoder.style
    rows = [dict(zip(UNIFIED_FIELDS, row, strict=True)) for row in zip(*map(batch.get, UNIFIED_FIELDS), strict=True)]
    quotes = encoder.quotes(rows)
    rows = [row if quoted is None else quoted.row for row, quoted in zip(rows, quotes, strict=True)]
    prompts = [prompt_text(row, style, tokenizer) for row in rows]
    if style == "chat":
        responses = [closing.answer(row, prompt, tokenizer) for row, prompt in zip(rows, prompts, strict=True)]
    else:
        responses = batch["output"]
    joint_texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    encoded = encoder.encode_all(prompts, quotes), encoder.encode_all(joint_texts, quotes)
    for prompt_ids, joint_ids, response, quoted in zip(*encoded, responses, quotes, strict=True):
        if joint_ids[: len(prompt_ids)] == prompt_ids:
            response_ids = joint_ids[len(prompt_ids) :]
        else:
            response_ids = encoder.encode(response, quoted, begins=False)
        yield prompt_ids, [*response_ids, closing.token_id]


def _encode_marked(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of texts in which special tokens are meant as such, and nothing around them."""
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    whole = tokenizer("x")["input_ids"]
    return next(whole[:i] for i in range(len(whole) + 1) if whole[i : i + len(bare)] == bare)
