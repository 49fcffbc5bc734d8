"""A run's output folder: which run it holds, and whether a run may begin or go on in it."""

import json
import shutil
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from hycam.environment import package_versions
from hycam.errors import InputError
from hycam.training.callbacks import PARTIAL_SUFFIX, write_whole
from hycam.training.recipe import Recipe, differing_fields, read_yaml
from hycam.training.tasks import TaskRows

RECIPE_FILE = "recipe.yaml"
RECORD_FILE = "run.json"

# What a run leaves in its folder (patterns), and `hycam eval` of it; a backbone from scratch outlives its runs.
_FILES = (RECIPE_FILE, RECORD_FILE, "metrics.jsonl", "results.json", "eval-*.json")
_WRITTEN = (
    *_FILES,
    *(str(Path(name).with_suffix(PARTIAL_SUFFIX)) for name in _FILES),
    "adapter",
    "model",
    "checkpoint-[0-9]*",
    "unfinished",
    "plots",
    "runs",  # TensorBoard's
)

# Fields (patterns) that may differ on resuming: none of them reaches a weight, the data's order or a random draw.
# Where a task's rows lie is free too: the rows themselves are compared.
_FREE_ON_RESUME = (
    "output_dir",
    "tasks.*.source",
    "data.cache_dir",
    "early_stopping",
    "evaluation",
    "trainer.logging_strategy",
    "trainer.logging_first_step",
    "trainer.eval_strategy",
    "trainer.save_strategy",
    "trainer.save_total_limit",
    "trainer.load_best_model_at_end",
    "trainer.report_to",
    "trainer.disable_tqdm",
    "trainer.log_level",
)


def check_folder(recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Raise `InputError` unless the recipe's output folder is free, or holds the same run and `resume` is set.

    `overwrite` frees a folder that holds a run and nothing else. A backbone trained from scratch that lies in the
    folder doesn't occupy it.
    """
    folder = recipe.output_path
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir: {folder} is a file, wanted a folder")
    record = folder / RECIPE_FILE
    if record.is_file():
        if overwrite:
            others = [entry.name for entry in _entries(folder) if not (_is_backbone(entry) or _is_written(entry))]
            if others:
                raise InputError(f"--overwrite: {folder} holds more than a run: {', '.join(sorted(others))}")
            return
        if not resume:
            raise InputError(f"output_dir: {folder} holds a run: --resume goes on with it, --overwrite deletes it")
        changed = _changed_fields(read_yaml(record), recipe.to_dict())
        if changed:
            raise InputError(f"--resume: the run in {folder} began with other values of: {', '.join(changed)}")
    elif any(not _is_backbone(entry) and entry.suffix != PARTIAL_SUFFIX for entry in _entries(folder)):
        raise InputError(f"output_dir: {folder} has files but no run in it, wanted a new or empty folder")


def holds_run_of(recipe: Recipe) -> bool:
    """Whether the recipe's output folder holds a run of this very recipe."""
    record = recipe.output_path / RECIPE_FILE
    return record.is_file() and not differing_fields(read_yaml(record), recipe.to_dict())


def open_folder(recipe: Recipe, rows: Mapping[str, TaskRows], processes: int, *, resume: bool, overwrite: bool) -> None:
    """Make the folder this run's: write its recipe and record, or check that data and processes are still the run's.

    Raises:
        InputError: on resuming with other rows, or on another number of processes, than the run began with.
    """
    folder = recipe.output_path
    if overwrite and (folder / RECIPE_FILE).is_file():
        for entry in _entries(folder):
            if _is_written(entry):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    data = {name: _fingerprint(task) for name, task in rows.items()}
    if resume and (folder / RECORD_FILE).is_file():
        before = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        if before["processes"] != processes:
            # a step would see another number of rows, and the data's order and the optimizer's parts belong to ranks
            raise InputError(f"--resume: the run in {folder} began on {before['processes']} processes, got {processes}")
        for name, fingerprint in data.items():
            if before["data"][name] != fingerprint:
                raise InputError(f"--resume: the rows of {name} are no longer those that the run began with")
        return
    folder.mkdir(parents=True, exist_ok=True)
    record = {"data": data, "processes": processes, "versions": package_versions()}
    # the recipe first: a folder is a run's from then on, whatever is killed in between
    write_whole(folder / RECIPE_FILE, yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    write_whole(folder / RECORD_FILE, json.dumps(record, indent=2) + "\n")


def _changed_fields(old: Any, new: Any) -> list[str]:
    return [name for name in differing_fields(old, new) if not _is_free(name)]


def _is_free(name: str) -> bool:
    return any(fnmatch(name, free) or fnmatch(name, f"{free}.*") for free in _FREE_ON_RESUME)


def _entries(folder: Path) -> Iterable[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _is_backbone(entry: Path) -> bool:
    return entry.is_dir() and entry.name.startswith("backbone-")


def _is_written(entry: Path) -> bool:
    return any(fnmatch(entry.name, written) for written in _WRITTEN)


def _fingerprint(task: TaskRows) -> dict[str, Any]:
    return {"rows": {split: len(dataset) for split, dataset in task.splits.items()}, "sha256": task.sha256}
