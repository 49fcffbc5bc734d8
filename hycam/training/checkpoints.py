"""A run's checkpoints on disk: which of them are whole."""

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hycam.training.callbacks import write_whole

UNFINISHED_FOLDER = "unfinished"
TRAINER_STATE = "trainer_state.json"
_FILES = "files.json"


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, None without one."""
    found = [(step, folder) for step, folder in _checkpoints(output_dir) if flaw(folder) is None]
    return max(found)[1] if found else None


def damaged_checkpoints(output_dir: Path) -> dict[Path, str]:
    """Each checkpoint that isn't whole, and what is wrong with it."""
    return {folder: reason for _, folder in _checkpoints(output_dir) if (reason := flaw(folder)) is not None}


def remove_unfinished(output_dir: Path) -> None:
    """Remove the checkpoints that aren't whole: half-written or half-deleted by a kill, or damaged since.

    Their steps are made again, and then saved under their names.
    """
    shutil.rmtree(output_dir / UNFINISHED_FOLDER, ignore_errors=True)
    for folder in damaged_checkpoints(output_dir):
        shutil.rmtree(folder)


def list_files(folder: Path) -> None:
    """Note in a checkpoint which files it has, and their sizes: without one of them training would go on otherwise."""
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
    write_whole(folder / _FILES, json.dumps(sizes, indent=1) + "\n")


def flaw(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None where it is as it was written."""
    if checkpoint_state(folder) is None:
        return f"{TRAINER_STATE} can't be read"
    if not (folder / _FILES).is_file():
        return None
    try:
        sizes = json.loads((folder / _FILES).read_text(encoding="utf-8"))
        for name, size in sizes.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, wanted {size}"
            if not _can_be_opened(file):
                return f"{name} can't be read"
    except (OSError, ValueError, AttributeError, TypeError):
        return f"{_FILES} can't be read"
    return None


def _can_be_opened(file: Path) -> bool:
    """Whether a file is of the kind that its name says; the numbers in it, which may be many GB, are not read."""
    try:
        if file.suffix in (".pt", ".pth"):  # torch.save's archive: a pickle, and the tensors' bytes in data/
            with zipfile.ZipFile(file) as archive:
                for name in archive.namelist():
                    if Path(name).parent.name != "data":
                        archive.read(name)
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
        elif file.suffix == ".json":
            json.loads(file.read_bytes())
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, SafetensorError):
        return False
    return True


def checkpoint_state(folder: Path) -> TrainerState | None:
    """The Trainer's state in a checkpoint, None where it is missing, cut short or no state."""
    try:
        state = TrainerState.load_from_json(str(folder / TRAINER_STATE))
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return state if isinstance(state.global_step, int) else None


def _checkpoints(output_dir: Path) -> Iterator[tuple[int, Path]]:
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.rpartition("-")[2]
        if step.isdecimal() and folder.is_dir():
            yield int(step), folder
