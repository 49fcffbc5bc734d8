"""A study's runs, read again, and what a report measures of their models and tokenizers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from hycam.analysis.general_text import text_perplexity, text_windows
from hycam.analysis.modulation import prompt_modulation
from hycam.analysis.token_statistics import token_statistics
from hycam.analysis.value_states import embed_value_states, token_value_states
from hycam.data.cache import digest, file_digest
from hycam.data.collation import Collator
from hycam.data.tokenization import IGNORED_LABEL
from hycam.training.folder import RECIPE_FILE, RESULTS_FILE, check_held_out, read_record, trained_folder
from hycam.training.measure import own_draws, training_precision
from hycam.training.recipe import Recipe, load_recipe
from hycam.training.recipe_files import read_yaml
from hycam.training.tasks import TaskRows, load_rows, responses_alone, row_cache, tokenize_split
from hycam.training.trained import Selection, load_selected_model, load_selected_tokenizer

# Fig. 2: rows of each task's test split, tokens drawn from them, and the layer whose value states they have. Fig. 4:
# tokens around the beginning of a task's first response, and features evenly spaced over the layer's width.
VALUE_STATE_ROWS = 100
VALUE_STATE_TOKENS = 200
VALUE_STATE_LAYER = -1
_TOKENS_BEFORE, _TOKENS_AFTER = 6, 14
_MODULATION_LAYERS = 2
_MODULATION_FEATURES = 64
_DIGITS = 4


@dataclass(frozen=True)
class RunFolder:
    """A finished run's folder, read again as far as it is needed.

    Attributes:
        path: the folder.
        backbones: where the study has what it trained from scratch for the run's backbone.
    """

    path: Path
    backbones: Path

    @cached_property
    def recipe(self) -> Recipe:
        """The run's, with a backbone that the study trained where the study's folder is, which may have been moved."""
        recipe = load_recipe(str(self.path))
        backbone = self.backbones / Path(str(recipe.backbone.name_or_path)).name
        if backbone.is_dir():
            recipe.backbone.name_or_path = str(backbone)
        return recipe

    @cached_property
    def has_weights(self) -> bool:
        """Whether what the run trained is still there."""
        return any(trained_folder(self.recipe).glob("*.safetensors"))

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What tells this run from another: its recipe and its numbers, which no other weights give."""
        return {name: file_digest(self.path / name) for name in (RECIPE_FILE, RESULTS_FILE)}

    @cached_property
    def token_inputs(self) -> dict[str, Any]:
        """What tells its token rows from others: the rows that the run began with, and who made tokens of them."""
        recipe = read_yaml(self.path / RECIPE_FILE)
        rows = read_record(self.path)["data"]
        return {"rows": rows, "settings": {"backbone": recipe["backbone"], "data": recipe["data"]}}

    @cached_property
    def rows(self) -> dict[str, TaskRows]:
        """The run's. Raises `InputError` where they would be split otherwise than when it was trained."""
        rows = load_rows(self.recipe.tasks, self.recipe.data)
        check_held_out(self.path, rows)
        return rows

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_selected_tokenizer(self._selection())[1]

    @cached_property
    def test_rows(self) -> dict[str, Dataset]:
        """Token rows of each task's test split, their labels on the responses."""
        return tokenize_split(self.rows, "test", self.tokenizer, responses_alone(self.recipe.data))

    @property
    def collator(self) -> Collator:
        assert self.tokenizer.pad_token_id is not None
        return Collator(self.tokenizer.pad_token_id)

    def model(self, *, adapted: bool = True) -> nn.Module:
        """The trained model, or its backbone alone, on the device that a run would use; loaded at each call."""
        selection = self._selection(adapted=adapted)
        return load_selected_model(selection, *load_selected_tokenizer(selection))

    @contextmanager
    def measuring(self, model: nn.Module) -> Iterator[None]:
        """The draws and the precision that every measurement of the run's models is made with."""
        device = next(model.parameters()).device
        with own_draws(self.recipe.seed, device), training_precision(self.recipe, device):
            yield

    def _selection(self, *, adapted: bool = False) -> Selection:
        return Selection(self.recipe, trained_folder(self.recipe) if adapted else None, self.path)


def measurement_settings() -> dict[str, Any]:
    """The settings of Fig. 2 and Fig. 4, which their measurements are made from too."""
    return {
        "value_states": [VALUE_STATE_ROWS, VALUE_STATE_TOKENS, VALUE_STATE_LAYER],
        "modulation": [_TOKENS_BEFORE, _TOKENS_AFTER, _MODULATION_LAYERS, _MODULATION_FEATURES],
    }


def measure_tokens(run: RunFolder) -> dict[str, Any]:
    """Table 1 of the run's backbone and data, and the tokens of each task's test split.

    Returns:
        `{"tasks": {name: what token_statistics returns, with "test_tokens"}}`.
    """
    cache = row_cache(run.recipe.data)
    return {
        "tasks": {
            name: token_statistics(task.split("all"), run.tokenizer, run.recipe.data, cache)
            | {"test_tokens": sum(map(len, run.test_rows[name]["input_ids"]))}
            for name, task in run.rows.items()
        }
    }


def measure_text(run: RunFolder, texts: list[str], *, adapted: bool) -> dict[str, Any]:
    """Perplexity of general text, by the trained model or by its backbone alone.

    Returns:
        What `text_perplexity` returns, and `texts`: a SHA-256 of the text.
    """
    windows = text_windows(texts, run.tokenizer, run.recipe.data.max_length)
    model = run.model(adapted=adapted)
    with run.measuring(model):
        result = text_perplexity(model, windows, run.collator.pad_token_id, batch_size=run.recipe.evaluation.batch_size)
    return result | {"texts": digest(texts)}


def measure_value_states(run: RunFolder, model: PeftModel) -> dict[str, Any]:
    """t-SNE of value states in the last layer of tokens of test rows, with the adapter and without.

    Returns:
        `{"layer", "layers", "tokens", "base": what embed_value_states returns, "adapted": ...}`.
    """
    rows = {task: dataset.select(range(min(VALUE_STATE_ROWS, len(dataset)))) for task, dataset in run.test_rows.items()}

    def embedded() -> dict[str, Any]:
        states = token_value_states(
            model,
            rows,
            run.collator,
            count=VALUE_STATE_TOKENS,
            layer=VALUE_STATE_LAYER,
            batch_size=run.recipe.evaluation.batch_size,
        )
        return embed_value_states(states)

    with run.measuring(model):
        adapted = embedded()
        with model.disable_adapter():
            base = embedded()
    layers = model.config.get_text_config().num_hidden_layers
    return {
        "layer": range(layers)[VALUE_STATE_LAYER],
        "layers": layers,
        "tokens": {task: len(points) for task, points in adapted["points"].items()},
        "base": _rounded(base),
        "adapted": _rounded(adapted),
    }


def measure_modulation(run: RunFolder, model: nn.Module, *, hide_text: bool = False) -> dict[str, Any]:
    """A_fusion of one test row of each task, from a few tokens before its response on.

    Args:
        hide_text: call the tokens by their place instead of by their text, as `token_places` does.

    Returns:
        `{"features": [...], "tasks": {name: {"first", "tokens", "layers": {module path: [tokens][features]}}}}`;
        `first` is the place of the first token, counted from the response's first.
    """
    tasks: dict[str, Any] = {}
    features: list[int] = []
    for task, dataset in run.test_rows.items():
        ids, labels = dataset[0]["input_ids"], dataset[0]["labels"]
        first = labels.count(IGNORED_LABEL)
        start, end = max(0, first - _TOKENS_BEFORE), first + _TOKENS_AFTER
        with run.measuring(model):
            modulation = prompt_modulation(model, ids[:end], max_layers=_MODULATION_LAYERS)
        width = next(iter(modulation.values())).shape[-1]
        features = torch.linspace(0, width - 1, min(width, _MODULATION_FEATURES)).round().int().tolist()
        tokens = [str(run.tokenizer.decode([token])) for token in ids[start:end]]
        tasks[task] = {
            "first": start - first,
            "tokens": token_places(start - first, len(tokens)) if hide_text else tokens,
            "layers": {name: _rounded(a[start:, features].float().tolist()) for name, a in modulation.items()},
        }
    return {"features": features, "tasks": tasks}


def token_places(first: int, count: int) -> list[str]:
    """Labels of `count` tokens in a row by their places, 0 being that of a response's first token."""
    return [f"{place:+d}" for place in range(first, first + count)]


def _rounded(value: Any) -> Any:
    """Floats at any depth to the digits that a figure shows, which keeps its file small."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
