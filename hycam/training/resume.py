"""Whether a run may go on where it was stopped, and from which checkpoint.

It must be the same run: what its recipe says but for fields that reach no number, its rows and their parts, its
engine's settings, its backbone's commit and its number of processes.
"""

import hashlib
import time
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from hycam.errors import InputError
from hycam.evaluation.batches import place_in_group
from hycam.training.adapters import check_adapter
from hycam.training.callbacks import read_metrics
from hycam.training.checkpoints import last_checkpoint
from hycam.training.folder import (
    METRICS_FILE,
    RECIPE_FILE,
    RECORD_FILE,
    SPLIT_SINCE,
    ended_in,
    is_split_otherwise,
    list_entries,
    read_record,
    recipe_values,
    settings_files,
)
from hycam.training.recipe import Recipe
from hycam.training.recipe_files import differing_fields
from hycam.training.tasks import TaskRows

_SEEN_WITHIN = 10.0  # seconds in which a network file system shows what another node wrote


# Fields (patterns) that may differ on resuming: none of them reaches a weight, the data's order or a random draw.
# Where a task's rows lie is free too, and the backbone's revision: the rows themselves and the commit are compared.
# When a run logs, validates and saves is not: the Trainer takes the numbers of steps from the checkpoint, and which
# weights are the best depends on it.
_FREE_ON_RESUME = (
    "output_dir",
    "tasks.*.source",
    "tasks.*.domain",
    "backbone.revision",
    "data.cache_dir",
    "early_stopping",
    "evaluation.batch_size",
    "evaluation.generation",
    "evaluation.max_new_tokens",
    "evaluation.max_generation_rows",
    "trainer.save_total_limit",
    "trainer.load_best_model_at_end",
    "trainer.ddp_timeout",
    "trainer.dataloader_num_workers",
    "trainer.dataloader_pin_memory",
    "trainer.dataloader_prefetch_factor",
    "trainer.report_to",
    "trainer.run_name",
    "trainer.disable_tqdm",
    "trainer.log_level",
    "trainer.log_level_replica",
    "trainer.log_on_each_node",
)


def check_same_recipe(recipe: Recipe) -> None:
    """Raise `InputError` where the run in the output folder began with other values of fields that may not differ."""
    folder = recipe.output_path
    changed = _changed_fields(recipe_values(folder / RECIPE_FILE), recipe.to_dict())
    if changed:
        raise InputError(f"--resume: the run in {folder} began with other values of: {', '.join(changed)}")


def check_record(recipe: Recipe, rows: Mapping[str, TaskRows], commit: str | None, processes: int) -> None:
    """Raise `InputError` where a run that is resumed began with what its recipe leaves out, and that is other now.

    These are its rows and their split, its engine's settings, its backbone's commit and its number of processes.

    Args:
        commit: the backbone's, on the hub.
    """
    folder = recipe.output_path
    if not (folder / RECORD_FILE).is_file():
        return
    before = read_record(folder)
    if before["processes"] != processes:
        # a step would see another number of rows, and the data's order and the optimizer's parts belong to ranks
        raise InputError(f"--resume: the run in {folder} began on {before['processes']} processes, got {processes}")
    for name, task in rows.items():
        began, now = before["data"].get(name), task.fingerprint()
        if began is not None and is_split_otherwise(began, now):
            raise InputError(
                f"--resume: the rows of {name} fall to other parts than when the run in {folder} began, {SPLIT_SINCE}: "
                "wanted a run from the start (--overwrite, or another output_dir)"
            )
        if began != now:
            raise InputError(f"--resume: the rows of {name} are no longer those that the run began with")
    for name, sha256 in settings_files(recipe.trainer).items():
        if before.get("settings", {}).get(name) != sha256:
            raise InputError(f"--resume: the file of trainer.{name} is no longer the one that the run began with")
    began = before.get("commit")
    if began != commit:
        raise InputError(
            f"--resume: the run in {folder} began with commit {began} of its backbone, got {commit}: "
            f"wanted --backbone.revision {began}"
        )


def shared_checkpoint(folder: Path, device: torch.device) -> Path | None:
    """The last checkpoint in the output folder, which every process sees as the main one does.

    Args:
        folder: the run's, open.
        device: where the processes exchange what they see.

    Raises:
        InputError: in every process, where one sees another run or checkpoint: its node has a folder of its own.
    """
    checkpoint, seen = _look(folder)
    if place_in_group()[1] == 1:
        return checkpoint
    wanted = torch.tensor(seen, device=device)
    torch.distributed.broadcast(wanted, 0)
    end = time.monotonic() + _SEEN_WITHIN
    while seen != wanted and time.monotonic() < end:
        time.sleep(0.2)
        checkpoint, seen = _look(folder)
    differs = torch.tensor(int(seen != wanted), device=device)
    torch.distributed.all_reduce(differs, torch.distributed.ReduceOp.MAX)
    if differs:
        raise InputError(
            f"output_dir: {folder} is not the same folder for every process, wanted one that all nodes see"
        )
    return checkpoint


def _look(folder: Path) -> tuple[Path | None, int]:
    """The last checkpoint, and 64 bits of a hash of the run's record and that checkpoint's name."""
    for parent in (folder.parent, folder):
        list_entries(parent)  # to list a folder makes a network file system look anew
    record, checkpoint = folder / RECORD_FILE, last_checkpoint(folder)
    content = record.read_bytes() if record.is_file() else b""
    digest = hashlib.sha256(content + (b"" if checkpoint is None else checkpoint.name.encode())).digest()
    return checkpoint, int.from_bytes(digest[:8], signed=True)


def _changed_fields(old: Any, new: Any) -> list[str]:
    return [name for name in differing_fields(old, new) if not _is_free(name)]


def _is_free(name: str) -> bool:
    return any(fnmatch(name, free) or fnmatch(name, f"{free}.*") for free in _FREE_ON_RESUME)


def check_undamaged(recipe: Recipe, config: PretrainedConfig, name: str) -> None:
    """Raise `InputError` where what a run goes on from is damaged: its log, or its adapter."""
    read_metrics(recipe.output_path / METRICS_FILE)
    if recipe.method.name == "full" or is_deepspeed_zero3_enabled():
        return
    for folder in (last_checkpoint(recipe.output_path), ended_in(recipe)):
        if folder is not None:
            try:
                check_adapter(folder, recipe.backbone, config, name)
            except InputError as error:
                raise InputError(f"--resume: {str(error).removeprefix('--adapter: ')}") from error
