"""What was trained, opened again: the backbone with an adapter's weights, or a whole model, and its tokenizer."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hycam.evaluation.generation import end_with_answers
from hycam.training.adapters import check_adapter
from hycam.training.backbone import (
    backbone_name,
    check_available,
    load_backbone_config,
    load_model,
    load_tokenizer,
)
from hycam.training.recipe import Recipe


@dataclass(frozen=True)
class Selection:
    """A recipe and the adapter's folder, None for the backbone alone; `run` is the run's folder that was named.

    After full fine-tuning the adapter's folder holds a whole model instead.
    """

    recipe: Recipe
    adapter: Path | None
    run: Path | None


def holds_model(folder: Path) -> bool:
    """Whether the folder holds a model that was trained whole, not an adapter."""
    return (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()


def load_selected_tokenizer(selection: Selection) -> tuple[str, PreTrainedTokenizerBase]:
    """Where the backbone is, and its tokenizer."""
    recipe = selection.recipe
    check_available(recipe.backbone)
    name = backbone_name(recipe.backbone, recipe.output_path, recipe.seed)
    return name, load_tokenizer(recipe.backbone, name)


def load_selected_model(
    selection: Selection, name: str, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel | PeftModel:
    """The backbone with the adapter, or the model that was trained whole, on the device that a run would use.

    Its generations end where the recipe's answers do.

    Args:
        name, tokenizer: what `load_selected_tokenizer` gives.

    Raises:
        InputError: an adapter, or a backbone, that is damaged or doesn't fit the other.
    """
    if selection.adapter is not None and holds_model(selection.adapter):
        trained = dataclasses.replace(
            selection.recipe.backbone, name_or_path=str(selection.adapter), scratch=None, gguf_file=None, revision=None
        )
        return _ready(selection, load_model(trained, str(selection.adapter)), tokenizer)
    config = load_backbone_config(selection.recipe.backbone, name)
    if selection.adapter is not None:
        check_adapter(selection.adapter, selection.recipe.backbone, config, name)
    model: Any = load_model(selection.recipe.backbone, name)
    if selection.adapter is not None:
        model = PeftModel.from_pretrained(model, str(selection.adapter))
    return _ready(selection, model, tokenizer)


def _ready(selection: Selection, model: Any, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | PeftModel:
    end_with_answers(model, tokenizer, selection.recipe.data.prompt)
    if selection.recipe.backbone.quantization is None:  # quantised layers stay where they were made
        model = model.to(selection.recipe.training_arguments().device)
    return model.eval()
