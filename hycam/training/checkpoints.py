"""A run's checkpoints on disk: which of them are whole."""

import json
import shutil
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

UNFINISHED_FOLDER = "unfinished"
TRAINER_STATE = "trainer_state.json"


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint of a run, None without one."""
    states = {folder: checkpoint_state(folder) for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    whole = [(state.global_step, folder) for folder, state in states.items() if state is not None]
    return max(whole)[1] if whole else None


def remove_unfinished(output_dir: Path) -> None:
    """Remove the checkpoints that a kill left half-written, or half-deleted."""
    shutil.rmtree(output_dir / UNFINISHED_FOLDER, ignore_errors=True)
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if checkpoint_state(folder) is None:
            shutil.rmtree(folder)


def checkpoint_state(folder: Path) -> TrainerState | None:
    """The Trainer's state in a checkpoint, None where it is missing or cut short."""
    try:
        return TrainerState.load_from_json(str(folder / TRAINER_STATE))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
