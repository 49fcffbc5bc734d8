"""Which backbone and adapter a command works with."""

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hycam.errors import InputError
from hycam.training.backbone import backbone_name, check_available, load_model, load_tokenizer
from hycam.training.recipe import Recipe, load_recipe, parse_recipe
from hycam.training.run import ADAPTER_FOLDER

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Selection:
    """A recipe and the adapter's folder, None for the backbone alone; `run` is the run's folder that was named."""

    recipe: Recipe
    adapter: Path | None
    run: Path | None


def select(options: Namespace, tasks: list[str] | None = None) -> Selection:
    """From the command's `recipe`, `--adapter`, `--base` and overrides.

    Without a recipe the adapter's own run gives it, or, for an adapter that lies elsewhere, the backbone that
    the adapter names; the options give the rest.

    Args:
        tasks: `NAME[=SOURCE]` of the tasks that replace the recipe's.

    Raises:
        InputError: no recipe and no backbone, or an adapter's folder without an adapter.
    """
    overrides = list(options.overrides)
    if tasks:
        listed = [dict(zip(("name", "source"), task.split("=", 1), strict=False)) for task in tasks]
        overrides.insert(0, ("tasks", yaml.safe_dump(listed, default_flow_style=True)))
    adapter = None if options.adapter is None else Path(options.adapter).expanduser()
    if adapter is not None:
        _check_adapter(adapter)
    source = options.recipe
    if source is None and adapter is not None and (adapter.parent / "recipe.yaml").is_file():
        source = str(adapter.parent)
    if source is None:
        recipe = parse_recipe(_named_backbone(adapter), "command line", overrides)
        return Selection(recipe, adapter, None)
    recipe = load_recipe(source, overrides)
    run = Path(source).expanduser() if Path(source).expanduser().is_dir() else None
    if adapter is None and run is not None and not options.base:
        adapter = run / ADAPTER_FOLDER
        _check_adapter(adapter)
    return Selection(recipe, adapter, run)


def _check_adapter(folder: Path) -> None:
    for name in _ADAPTER_FILES:
        if not (folder / name).is_file():
            raise InputError(f"--adapter: {folder} has no {name}, wanted a folder that holds an adapter")


def _named_backbone(adapter: Path | None) -> dict[str, dict[str, str]]:
    if adapter is None:
        return {}
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
    """The backbone with the adapter, on the device that the recipe's run would use."""
    model: Any = load_model(selection.recipe.backbone, name)
    if selection.adapter is not None:
        try:
            model = PeftModel.from_pretrained(model, str(selection.adapter))
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()
            raise InputError(
                f"--adapter: {selection.adapter} can't be loaded into {name}: {' '.join(reason[:2])}"
            ) from error
    return model.to(selection.recipe.training_arguments().device).eval()
