"""Which backbone and adapter a command works with."""

import dataclasses
import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hycam.data import TaskConfig
from hycam.errors import InputError
from hycam.training.backbone import backbone_name, check_available, load_model, load_tokenizer
from hycam.training.recipe import Recipe, load_recipe, parse_recipe
from hycam.training.run import trained_folder

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Selection:
    """A recipe and the adapter's folder, None for the backbone alone; `run` is the run's folder that was named.

    After full fine-tuning the adapter's folder holds a whole model instead.
    """

    recipe: Recipe
    adapter: Path | None
    run: Path | None


def select(options: Namespace, tasks: list[str] | None = None) -> Selection:
    """From the command's `recipe`, `--adapter`, `--base` and overrides.

    Without a recipe the adapter's own run gives it, or, for an adapter that lies elsewhere, the backbone that
    the adapter names; the options give the rest.

    Args:
        tasks: `NAME[=SOURCE]` of the tasks that replace the recipe's; a name alone may be one of the recipe's own.

    Raises:
        InputError: no recipe and no backbone, or an adapter's folder without an adapter.
    """
    overrides = list(options.overrides)
    adapter = None if options.adapter is None else Path(options.adapter).expanduser()
    if adapter is not None:
        _check_adapter(adapter)
    source = options.recipe
    if source is None and adapter is not None and (adapter.parent / "recipe.yaml").is_file():
        source = str(adapter.parent)
    if source is None:
        recipe = parse_recipe(_named_backbone(adapter), "command line", overrides)
        recipe.tasks = _chosen_tasks(tasks, recipe.tasks)
        return Selection(recipe, adapter, None)
    recipe = load_recipe(source, overrides)
    recipe.tasks = _chosen_tasks(tasks, recipe.tasks)
    run = Path(source).expanduser() if Path(source).expanduser().is_dir() else None
    if adapter is None and run is not None and not options.base:
        adapter = run / trained_folder(recipe).name
        _check_adapter(adapter)
    return Selection(recipe, adapter, run)


def _chosen_tasks(chosen: list[str] | None, own: list[TaskConfig]) -> list[TaskConfig]:
    if not chosen:
        return own
    known = {task.name: task for task in own}
    parts = [task.partition("=") for task in chosen]
    return [
        known[name] if not equals and name in known else TaskConfig(name, source or None)
        for name, equals, source in parts
    ]


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()


def _check_adapter(folder: Path) -> None:
    if _holds_model(folder):
        return
    for name in _ADAPTER_FILES:
        if not (folder / name).is_file():
            raise InputError(f"--adapter: {folder} has no {name}, wanted a folder that holds an adapter")


def _named_backbone(adapter: Path | None) -> dict[str, dict[str, str]]:
    if adapter is None:
        return {}
    if _holds_model(adapter):
        return {"backbone": {"name_or_path": str(adapter)}}
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    name = config.get("base_model_name_or_path")
    return {"backbone": {"name_or_path": name}} if name else {}


def load_selected_tokenizer(selection: Selection) -> tuple[str, PreTrainedTokenizerBase]:
    """Where the backbone is, and its tokenizer."""
    recipe = selection.recipe
    check_available(recipe.backbone)
    name = backbone_name(recipe.backbone, recipe.output_path, recipe.seed)
    return name, load_tokenizer(recipe.backbone, name)


def load_selected_model(selection: Selection, name: str) -> PreTrainedModel | PeftModel:
    """The backbone with the adapter, or the model that was trained whole, on the device that a run would use."""
    if selection.adapter is not None and _holds_model(selection.adapter):
        trained = dataclasses.replace(selection.recipe.backbone, revision=None)
        return _placed(selection, load_model(trained, str(selection.adapter)))
    model: Any = load_model(selection.recipe.backbone, name)
    if selection.adapter is not None:
        try:
            model = PeftModel.from_pretrained(model, str(selection.adapter))
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()
            raise InputError(
                f"--adapter: {selection.adapter} can't be loaded into {name}: {' '.join(reason[:2])}"
            ) from error
    return _placed(selection, model)


def _placed(selection: Selection, model: Any) -> PreTrainedModel | PeftModel:
    if selection.recipe.backbone.quantization is None:  # quantised layers stay where they were made
        model = model.to(selection.recipe.training_arguments().device)
    return model.eval()
