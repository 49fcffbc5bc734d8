"""Responses, greedy unless sampling is asked for, and BLEU-4 and ROUGE-L of them."""

import copy
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import GENERATION_CONFIG_NAME

from hycam.data.closing import closing_of
from hycam.data.tokenization import encode_prompt
from hycam.errors import InputError
from hycam.evaluation.batches import device_of, evaluation_mode, unwrap
from hycam.evaluation.rope import group_by_frequencies

logger = logging.getLogger(__name__)


def generate_responses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    sampling: Mapping[str, float] | None = None,
    on_text: Callable[[str], object] | None = None,
) -> list[str]:
    """The model's continuation of each prompt, up to its end-of-sequence token: greedy, or sampled.

    Prompts of a batch are padded on the left here, so the tokenizer's own padding settings neither matter nor
    change. Of the model's generation settings none but its end tokens counts. Where the frequencies of rotary
    embeddings follow a row's length (longrope), each response is that of its prompt alone, without a cache where the
    row grows into other ones.

    Args:
        prompts: texts, in which special tokens are meant as such, or token ids.
        sampling: draw each token from the model's distribution, changed by these: `temperature`, `top_p`, `top_k`; by
            none of them where it is empty. None: greedy.
        on_text: is told the response to the only prompt as it is made, a few words at a time.

    Raises:
        InputError: an option below 1, `on_text` with several prompts, an empty prompt, no end-of-sequence token, or a
            prompt that with `max_new_tokens` exceeds the model's positions; all before the first token is generated.
    """
    for option, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{option}: {value} given, at least 1 is wanted")
    if on_text is not None and len(prompts) != 1:
        raise InputError(f"on_text: given with {len(prompts)} prompts, wanted one prompt, whose response it is told")
    bare = unwrap(model)
    encoded = encode_prompts(prompts, tokenizer, bare.config, max_new_tokens)
    ends = _end_tokens(bare, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    settings = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad, num_beams=1)
    if sampling is None:
        settings.do_sample = False
    else:
        # transformers' own default keeps the 50 likeliest tokens
        settings.update(do_sample=True, **{"temperature": 1.0, "top_p": 1.0, "top_k": 0} | dict(sampling))
    streamer = None if on_text is None else _Pieces(tokenizer, ends, on_text)
    responses = [""] * len(encoded)
    # the last new token is never an input
    groups = group_by_frequencies([len(ids) for ids in encoded], bare.config, growth=max_new_tokens - 1)
    with evaluation_mode(bare), _own_settings(bare, settings):
        for group in groups:
            settings.use_cache = not group.crosses
            for start in range(0, len(group.rows), batch_size):
                rows = group.rows[start : start + batch_size]
                inputs = _pad_left([encoded[row] for row in rows], pad, device_of(bare))
                output = bare.generate(**inputs, generation_config=settings, streamer=streamer)
                new_tokens = output[:, inputs["input_ids"].shape[1] :].tolist()
                for row, ids in zip(rows, new_tokens, strict=True):
                    responses[row] = str(tokenizer.decode(_until(ids, ends), skip_special_tokens=True))
    return responses


class _Pieces(TextStreamer):
    """Hands on the response as it is made, without its end token, special or not."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], on_text: Callable[[str], object]
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._ends, self._on_text = ends, on_text

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt or int(value) not in self._ends:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)


def end_with_answers(model: nn.Module, tokenizer: PreTrainedTokenizerBase, style: str) -> None:
    """Add the token that closes an answer in a prompt style to the end tokens of the model's generation settings.

    A base model's settings end its texts at the tokenizer's eos token, which a chat template need not write.

    Raises:
        InputError: as `closing_of`.
    """
    closing = closing_of(style, tokenizer)
    if closing.replaces:
        logger.warning(
            "the chat template closes an answer with %r, in which there is no token of its own: %r is trained, and "
            "ends a generation, in its place",
            closing.rendered,
            tokenizer.eos_token,
        )
    bare = unwrap(model)
    settings = copy.deepcopy(bare.generation_config)
    settings.eos_token_id = list(dict.fromkeys([*_end_tokens(bare, tokenizer), closing.token_id]))
    with tempfile.TemporaryDirectory() as folder:
        # read from a file: transformers refuses to save changed settings for flaws that it bears with in published ones
        settings.to_json_file(str(Path(folder, GENERATION_CONFIG_NAME)))
        settings = type(settings).from_pretrained(folder)
    for owner in _settings_owners(bare):
        owner.generation_config = settings


@contextmanager
def _own_settings(model: nn.Module, settings: GenerationConfig) -> Iterator[None]:
    """Put `settings` in the place of the model's own, from which `generate` takes all that a call leaves unset."""
    owners = _settings_owners(model)
    before = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = settings
        yield
    finally:
        for owner, own in zip(owners, before, strict=True):
            owner.generation_config = own


def _settings_owners(model: nn.Module) -> list[Any]:
    """The modules that have generation settings: the backbone, and what wraps it."""
    return [module for module in model.modules() if "generation_config" in vars(module)]


def encode_prompts(
    prompts: Sequence[str | list[int]],
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    max_new_tokens: int,
) -> list[list[int]]:
    """The token ids of each prompt, for a model of this configuration.

    Raises:
        InputError: an empty prompt, one that with `max_new_tokens` exceeds the model's positions, or one with a token
            that the model has no embedding for.
    """
    encoded = [encode_prompt(prompt, tokenizer) if isinstance(prompt, str) else prompt for prompt in prompts]
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    embeddings = config.get_text_config().vocab_size
    for row, ids in enumerate(encoded):
        if not ids:
            raise InputError(f"prompts: prompt {row} is empty, at least one token is wanted")
        if max(ids) >= embeddings:
            token = tokenizer.convert_ids_to_tokens(max(ids))
            raise InputError(
                f"prompts: prompt {row} has the token {token!r} with id {max(ids)}, but the model has embeddings for "
                f"{embeddings} tokens"
            )
        if positions is not None and len(ids) + max_new_tokens > positions:
            raise InputError(
                f"prompts: prompt {row} has {len(ids)} tokens, which with max_new_tokens={max_new_tokens} "
                f"exceeds the model's {positions} positions"
            )
    return encoded


def _end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End tokens of the tokenizer and of the model's generation settings (chat models have several)."""
    of_model = getattr(model.generation_config, "eos_token_id", None)
    ends = [*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    if not ends:
        raise InputError("tokenizer: neither it nor the model names an end-of-sequence token, one is wanted")
    return ends


def _pad_left(rows: list[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    width = max(len(ids) for ids in rows)
    padded = [[pad] * (width - len(ids)) + ids for ids in rows]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in rows]
    return {
        "input_ids": torch.tensor(padded, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def _until(ids: list[int], ends: list[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def evaluate_generation(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU-4 and ROUGE-L of predictions against one reference each, both from 0 to 100.

    `bleu4`: sacrebleu's corpus BLEU up to 4-grams, 13a tokenizer, no smoothing: 0 where no 4-gram matches.
    `rougeL`: rouge-score's F1 of the longest common subsequence, no stemming, mean over rows. Its tokens are
    lower-cased runs of a-z and 0-9: text in other scripts scores 0.

    Raises:
        InputError: no prediction, or another number of references.
    """
    if not predictions or len(predictions) != len(references):
        raise InputError(
            f"predictions: {len(predictions)} given with {len(references)} references, "
            "as many of both are wanted, at least one"
        )
    bleu = BLEU(max_ngram_order=4, tokenize="13a", smooth_method="none", effective_order=False)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(references, predictions, strict=True)
    rouge = [scorer.score(reference, prediction)["rougeL"].fmeasure for reference, prediction in pairs]
    return {
        "bleu4": bleu.corpus_score(list(predictions), [list(references)]).score,
        "rougeL": 100.0 * sum(rouge) / len(rouge),
    }


def evaluate_generation_tasks(
    predictions: Mapping[str, Sequence[str]], references: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """`evaluate_generation` per task, and over the rows of all tasks pooled into one corpus.

    Returns:
        `{"tasks": {name: {"bleu4", "rougeL", "rows"}}, "overall": {...}}`.

    Raises:
        InputError: other tasks in `references`, or what `evaluate_generation` refuses.
    """
    if predictions.keys() != references.keys():
        raise InputError(f"references: tasks {sorted(references)} given, {sorted(predictions)} are wanted")
    tasks = {
        name: {**evaluate_generation(rows, references[name]), "rows": len(rows)} for name, rows in predictions.items()
    }
    pooled = [row for rows in predictions.values() for row in rows]
    wanted = [row for name in predictions for row in references[name]]
    return {"tasks": tasks, "overall": {**evaluate_generation(pooled, wanted), "rows": len(pooled)}}


def note_on_bleu(reports: Iterable[Mapping[str, Any]]) -> str | None:
    """What the reader of a BLEU-4 of 0 is told; None where there is none.

    Args:
        reports: with `{"tasks": {name: {"bleu4", ...}}, "overall": {"bleu4", ...}}` each, where they were generated.
    """
    measured = [values for report in reports for values in (*report["tasks"].values(), report["overall"])]
    if 0 not in (values.get("bleu4") for values in measured):
        return None
    return (
        "A BLEU-4 of 0: no run of four tokens matched, and nothing is smoothed. An answer of fewer tokens has no such "
        "run, however right it is: of short answers ROUGE-L tells more."
    )
