"""A run's output folder: which run it holds, and whether one may begin in it."""

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from hycam.environment import package_versions
from hycam.errors import InputError, RunStoppedError, check_format_version, is_disk_full
from hycam.locks import claim
from hycam.training.callbacks import PARTIAL_SUFFIX, write_whole
from hycam.training.engines import find_deepspeed_settings
from hycam.training.recipe import Recipe, parse_recipe
from hycam.training.recipe_files import differing_fields, read_yaml
from hycam.training.tasks import TaskRows

RECIPE_FILE = "recipe.yaml"
RECORD_FILE = "run.json"
LOCK_FILE = "run.lock"
METRICS_FILE = "metrics.jsonl"
RESULTS_FILE = "results.json"
ADAPTER_FOLDER = "adapter"
MODEL_FOLDER = "model"
# Of what a run writes to be opened again; a record without it is of version 1.
FORMAT_VERSION = 1
# What parted rows before this and makes older runs' parts other ones.
SPLIT_SINCE = "by another fold or split_by, or by a version before rows were split by their instruction alone"

# What a run leaves in its folder (patterns), and `hycam eval` of it; a backbone from scratch outlives its runs.
_FILES = (RECIPE_FILE, RECORD_FILE, METRICS_FILE, RESULTS_FILE, "eval-*.json")
_WRITTEN = (
    *_FILES,
    *(str(Path(name).with_suffix(PARTIAL_SUFFIX)) for name in _FILES),
    ADAPTER_FOLDER,
    MODEL_FOLDER,
    "checkpoint-[0-9]*",
    "unfinished",
    "plots",
    "runs",  # TensorBoard's
    LOCK_FILE,
)
# Of these, what was trained or measured.
_PROGRESS = (ADAPTER_FOLDER, MODEL_FOLDER, "checkpoint-[0-9]*", RESULTS_FILE, "eval-*.json")


def check_folder(recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Raise `InputError` unless the recipe's output folder is free, or holds a run and `resume` is set.

    `overwrite` frees a folder that holds a run and nothing else. A backbone trained from scratch that lies in the
    folder doesn't occupy it.
    """
    folder = recipe.output_path
    _check_is_folder(folder)
    record = folder / RECIPE_FILE
    if record.is_file():
        if overwrite or not has_progress(folder):
            others = [entry.name for entry in list_entries(folder) if not (_is_backbone(entry) or _is_written(entry))]
            if others:
                option = "--overwrite" if overwrite else "output_dir"
                raise InputError(f"{option}: {folder} holds more than a run: {', '.join(sorted(others))}")
            return
        if not resume:
            raise InputError(f"output_dir: {folder} holds a run: --resume goes on with it, --overwrite deletes it")
    elif any(not (_is_backbone(entry) or _is_written_first(entry)) for entry in list_entries(folder)):
        raise InputError(f"output_dir: {folder} has files but no run in it, wanted a new or empty folder")


def _check_is_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir: {folder} is a file, wanted a folder")


def has_progress(folder: Path) -> bool:
    """Whether a run's folder holds anything that was trained or measured; else nothing is lost with it."""
    return any(fnmatch(entry.name, name) for entry in list_entries(folder) for name in _PROGRESS)


def trained_folder(recipe: Recipe) -> Path:
    """Where a run of the recipe leaves what it trained: the adapter, or the whole model."""
    return recipe.output_path / (MODEL_FOLDER if recipe.method.name == "full" else ADAPTER_FOLDER)


def ended_in(recipe: Recipe) -> Path | None:
    """Where the run in the output folder left what it trained, None before it has ended."""
    folder = trained_folder(recipe)
    return folder if folder.is_dir() and read_results(recipe.output_path) is not None else None


def read_results(folder: Path) -> dict[str, Any] | None:
    """What a run's `results.json` holds, None where it isn't there or can't be read."""
    try:
        results = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return results if isinstance(results, dict) and {"steps", "epochs", "best_step"} <= results.keys() else None


def read_object(path: Path, wanted: Collection[str], advice: str) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        path: of the file.
        wanted: the keys that it must have.
        advice: what to do with a file that is damaged.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file can't be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read: {error}; {advice}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: damaged: got a {type(values).__name__}, wanted an object; {advice}")
    check_keys(path, values, wanted, advice)
    return values


def check_keys(path: Path, values: Mapping[str, Any], wanted: Collection[str], advice: str) -> None:
    """Raise `InputError` where the object that a file held lacks a key."""
    if missing := [key for key in wanted if key not in values]:
        raise InputError(f"{path}: damaged: {', '.join(missing)} missing; {advice}")


@contextmanager
def hold_folder(recipe: Recipe) -> Iterator[None]:
    """Make the output folder, and keep other processes from training in it; what a kill leaves behind is free.

    A folder in which no run has begun is removed again.

    Raises:
        InputError: it can't be made, or another process holds it.
    """
    folder = recipe.output_path
    _check_is_folder(folder)
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        with claim(folder / LOCK_FILE) as held:
            if not held:
                raise InputError(f"output_dir: {folder}: another process trains in it")
            try:
                yield
            finally:
                (folder / LOCK_FILE).unlink(missing_ok=True)
                for made in missing:
                    if made.is_dir() and not list_entries(made):
                        made.rmdir()
    except OSError as error:
        if error.filename is not None and Path(error.filename) in (folder / LOCK_FILE, folder, *folder.parents):
            raise InputError(f"output_dir: {folder} can't be made: {error.strerror}") from error
        raise


@contextmanager
def disk_full_told(folder: Path, kept: Callable[[Path], str]) -> Iterator[None]:
    """Turn a write that found no room into one line that says so, and how to go on.

    Args:
        kept: what is said of the checkpoints in `folder`.

    Raises:
        RunStoppedError: no room on a disk.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        where = f"disk full: {error}".splitlines()[0]
        raise RunStoppedError(
            f"{where}; {kept(folder)}; with room, go on with: hycam train {folder} --resume"
        ) from error


def holds_run_of(recipe: Recipe) -> bool:
    """Whether the recipe's output folder holds a run of this very recipe."""
    record = recipe.output_path / RECIPE_FILE
    return record.is_file() and not differing_fields(recipe_values(record), recipe.to_dict())


def recipe_values(path: Path) -> dict[str, Any]:
    """A run's recipe, with today's defaults for the fields that it was written without."""
    return parse_recipe(read_yaml(path), str(path)).to_dict()


def check_held_out(folder: Path, rows: Mapping[str, TaskRows]) -> None:
    """Raise `InputError` where rows that the run in a folder was trained on would count as held out from it."""
    if not (folder / RECORD_FILE).is_file():
        return
    before = read_record(folder)["data"]
    for name, task in rows.items():
        if name in before and is_split_otherwise(before[name], task.fingerprint()):
            raise InputError(
                f"data: the rows of {name} that are held out now are not those of the run in {folder}, {SPLIT_SINCE}: "
                "it was trained on some of them"
            )


def is_split_otherwise(began: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of the same rows in other parts; older records have no digest of the held-out."""
    return began["sha256"] == now["sha256"] and began.get("held_out") != now["held_out"]


def has_own_split(folder: Path) -> bool:
    """Whether a run's record tells its rows' split; a folder without a record has nothing to tell."""
    if not (folder / RECORD_FILE).is_file():
        return True
    return all("held_out" in fingerprint for fingerprint in read_record(folder)["data"].values())


def read_record(folder: Path) -> dict[str, Any]:
    """A run's record. Raises `InputError` where it can't be read."""
    path = folder / RECORD_FILE
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        check_format_version(record.get("format_version", 1), FORMAT_VERSION, f"{path}: ")
        fingerprints, settings = record["data"].values(), record.get("settings", {})
        whole = all(isinstance(fingerprint["sha256"], str) for fingerprint in fingerprints)
        if whole and isinstance(settings, dict) and isinstance(record["processes"], int):
            return record
        reason = "data, settings or processes are not what a run writes"
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise InputError(f"{path}: not a run's record, wanted it as the run wrote it ({reason})")


def open_folder(
    recipe: Recipe,
    rows: Mapping[str, TaskRows],
    commit: str | None,
    processes: int,
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Make the folder this run's: write its recipe and record, unless it goes on there.

    What a try that trained nothing has left is replaced.

    Args:
        commit: the backbone's, on the hub.
    """
    folder = recipe.output_path
    if (folder / RECIPE_FILE).is_file() and (overwrite or not has_progress(folder)):
        for entry in list_entries(folder):
            if _is_written(entry) and entry.name != LOCK_FILE:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    if resume and (folder / RECORD_FILE).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    # the id tells this folder from another node's with an equal run in it
    record = {
        "format_version": FORMAT_VERSION,
        "id": uuid.uuid4().hex,
        "data": {name: task.fingerprint() for name, task in rows.items()},
        "settings": settings_files(recipe.trainer),
        "commit": commit,
        "processes": processes,
        "versions": package_versions(),
    }
    # the recipe first: a folder is a run's from then on, whatever is killed in between
    write_whole(folder / RECIPE_FILE, yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    write_whole(folder / RECORD_FILE, json.dumps(record, indent=2) + "\n")


def settings_files(trainer: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the files that hold an engine's settings, by their field."""
    named = {"deepspeed": find_deepspeed_settings(trainer.get("deepspeed")), "fsdp_config": trainer.get("fsdp_config")}
    files = {name: Path(value) for name, value in named.items() if isinstance(value, str)}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file.is_file()}


def list_entries(folder: Path) -> Iterable[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _is_backbone(entry: Path) -> bool:
    return entry.is_dir() and entry.name.startswith("backbone-")


def _is_written_first(entry: Path) -> bool:
    """Whether a run writes the entry before its recipe: its lock, and a file that a kill has left unfinished."""
    return entry.name == LOCK_FILE or entry.suffix == PARTIAL_SUFFIX


def _is_written(entry: Path) -> bool:
    return any(fnmatch(entry.name, written) for written in _WRITTEN)
