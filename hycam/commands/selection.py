"""Which backbone and adapter a command works with."""

import os
from argparse import Namespace
from pathlib import Path

from hycam.data.config import TaskConfig
from hycam.data.formats import KNOWN_SETS
from hycam.data.sources import is_source
from hycam.errors import InputError
from hycam.training.adapters import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config
from hycam.training.folder import trained_folder
from hycam.training.recipe import load_recipe, parse_recipe
from hycam.training.trained import Selection, check_ended, holds_model

_ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)


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
        check_ended(run, adapter)
        _check_adapter(adapter)
    return Selection(recipe, adapter, run)


def check_output(path: Path) -> None:
    """Raise `InputError` for a file of results that can't be written, before there are any."""
    if path.is_dir():
        raise InputError(f"--output: {path} is a folder, wanted a file")
    if not path.parent.is_dir():
        raise InputError(f"--output: {path.parent} is no folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"--output: {path} can't be written")


def _chosen_tasks(chosen: list[str] | None, own: list[TaskConfig]) -> list[TaskConfig]:
    if not chosen:
        return own
    known = {task.name: task for task in own}
    parts = [task.partition("=") for task in chosen]
    for name, equals, _ in parts:
        if not equals and name not in known and not is_source(name):
            raise InputError(
                f"--task: {name!r} is none of the recipe's ({', '.join(known) or 'it has none'}), nor a known set "
                f"({', '.join(KNOWN_SETS)}): wanted one, or NAME=SOURCE"
            )
    return [
        known[name] if not equals and name in known else TaskConfig(name, source or None)
        for name, equals, source in parts
    ]


def _check_adapter(folder: Path) -> None:
    if holds_model(folder):
        return
    for name in _ADAPTER_FILES:
        if not (folder / name).is_file():
            raise InputError(f"--adapter: {folder} has no {name}, wanted a folder that holds an adapter")


def _named_backbone(adapter: Path | None) -> dict[str, dict[str, str]]:
    if adapter is None:
        return {}
    if holds_model(adapter):
        return {"backbone": {"name_or_path": str(adapter)}}
    name = read_adapter_config(adapter).base_model_name_or_path
    return {"backbone": {"name_or_path": name}} if name else {}
