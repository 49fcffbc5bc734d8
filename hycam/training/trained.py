"""What was trained, opened again: the backbone with an adapter's weights, or a whole model, and its tokenizer."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hycam.errors import InputError
from hycam.evaluation.generation import end_with_answers
from hycam.training.adapters import check_adapter, keeps_dtype
from hycam.training.backbone import (
    backbone_name,
    check_available,
    load_backbone_config,
    load_model,
    load_tokenizer,
)
from hycam.training.checkpoints import last_checkpoint
from hycam.training.folder import trained_folder
from hycam.training.recipe import Recipe, load_recipe


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


def check_ended(run: Path, trained: Path) -> None:
    """Raise `InputError`, saying how to go on, for a run whose folder has not got what it trains."""
    if trained.is_dir():
        return
    checkpoint = last_checkpoint(run)
    raise InputError(
        f"{run}: the run has not ended: hycam train {run} --resume goes on with it"
        + ("" if checkpoint is None else f", --adapter {checkpoint} takes what it had saved")
    )


def load_run(folder: str | os.PathLike) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """What a run trained, in evaluation mode on the device that the run would use, and its tokenizer.

    Args:
        folder: the run's `output_dir`.

    Returns:
        The backbone with the adapter (after full fine-tuning, the model) and the tokenizer. Generations end where the
        run's answers do.

    Raises:
        InputError: (a ValueError) where there is no run that has ended, or a file of it is damaged.
    """
    recipe = load_recipe(os.fspath(folder))
    run = Path(folder).expanduser()
    trained = run / trained_folder(recipe).name
    check_ended(run, trained)
    selection = Selection(recipe, trained, run)
    name, tokenizer = load_selected_tokenizer(selection)
    return load_selected_model(selection, name, tokenizer), tokenizer


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
        autocast = not keeps_dtype(selection.adapter, model)
        model = PeftModel.from_pretrained(model, str(selection.adapter), autocast_adapter_dtype=autocast)
    return _ready(selection, model, tokenizer)


def _ready(selection: Selection, model: Any, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | PeftModel:
    end_with_answers(model, tokenizer, selection.recipe.data.prompt)
    if selection.recipe.backbone.quantization is None:  # quantised layers stay where they were made
        model = model.to(selection.recipe.training_arguments().device)
    return model.eval()
