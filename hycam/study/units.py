"""What a study consists of: backbones to train, learning rates to try, and cells, each with a folder and a lock."""

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hycam.study.recipe import Study
from hycam.training.callbacks import write_whole
from hycam.training.folder import ADAPTER_FOLDER, MODEL_FOLDER, RESULTS_FILE, check_keys, read_object

# A study's backbone is no method's: all runs share it, whatever their own seeds are.
BACKBONE_SEED = 0

# the one result of a run whose loss or gradient did not stay finite
DIVERGED = "diverged"

_WORK_FOLDER = "work"
# what every other run's results have
_RESULTS = ("recipe", "parameters", "versions", "devices", "steps", "best_step")


@dataclass(frozen=True)
class Unit:
    """One piece of a study's work.

    Attributes:
        backbone: its name.
        method: its name; None: the unit trains the backbone from scratch.
        fold, seed: of the run.
        tried_rate: the learning rate that the run tries out on the validation split; None: the run is a cell of the
            tables, at the rate that was chosen.
    """

    backbone: str
    method: str | None = None
    fold: int = 0
    seed: int = 0
    tried_rate: float | None = None

    @property
    def folder(self) -> str:
        """Where it leaves its files, in the study's folder."""
        if self.method is None:
            return f"backbones/{self.backbone}"
        if self.tried_rate is not None:
            return f"tuning/{self.backbone}/{self.method}/lr-{self.tried_rate:g}"
        return f"cells/{self.backbone}/{self.method}/fold{self.fold}-seed{self.seed}"


def units(study: Study) -> list[Unit]:
    """All of a study's work, in the order in which it is taken up: what others need comes first."""
    trained = [Unit(name) for name, section in study.backbones.items() if section.get("scratch") is not None]
    return [*trained, *tuning(study), *cells(study)]


def tuning(study: Study) -> list[Unit]:
    """The runs that choose the learning rates; none for a method with one rate.

    With `widen_rates` those beyond a grid's edge come as soon as the results ask for them.
    """
    return [
        unit
        for backbone in study.backbones
        for method in study.methods
        if len(study.rates(method)) > 1
        for unit in _grid(study, backbone, method)
    ]


def _grid(study: Study, backbone: str, method: str) -> list[Unit]:
    def tried(rate: float) -> Unit:
        return Unit(backbone, method, study.folds[0], study.seeds[0], rate)

    grid = [tried(rate) for rate in study.rates(method)]
    for _ in range(study.widen_rates):
        rates = sorted(unit.tried_rate for unit in grid if unit.tried_rate is not None)
        best = best_rate(study, grid)
        if best == rates[0]:
            beyond = rates[0] / (rates[1] / rates[0])
        elif best == rates[-1]:
            beyond = rates[-1] * (rates[-1] / rates[-2])
        else:
            break
        grid.append(tried(float(f"{beyond:.4g}")))  # a ratio's rounding is no part of a folder's name
    return grid


def best_rate(study: Study, grid: Sequence[Unit]) -> float | None:
    """The rate with the lowest validation loss, the lower one of equals.

    None while the grid isn't done, and where training broke down at all of its rates.
    """
    if not all(is_done(study, run) for run in grid):
        return None
    losses = [(loss, run.tried_rate) for run in grid if (loss := validation_loss(study, run)) is not None]
    return min(losses)[1] if losses else None


def edge_of(study: Study, backbone: str, method: str) -> str | None:
    """Which end of its grid the best rate is, `lowest` or `highest`; None for one inside, or of no grid."""
    grid = [unit for unit in tuning(study) if (unit.backbone, unit.method) == (backbone, method)]
    rates = [unit.tried_rate for unit in grid if unit.tried_rate is not None]
    best = best_rate(study, grid) if grid else None
    return None if best is None else {min(rates): "lowest", max(rates): "highest"}.get(best)


def validation_loss(study: Study, unit: Unit) -> float | None:
    """The loss of the weights that a run of a grid ended with, on validation rows that no fold tests.

    None where training broke down, and where the loss is not finite.
    """
    measured = results(study, unit)
    if measured is None or DIVERGED in measured:
        return None
    overall = measured["untested"]["overall"]
    return None if overall["nll"] is None else overall["nll"] / overall["tokens"]


def cells(study: Study) -> list[Unit]:
    """The runs that the tables are made of; a seed's runs of all methods follow each other."""
    return [
        Unit(backbone, method, fold, seed)
        for backbone in study.backbones
        for fold in study.folds
        for seed in study.seeds
        for method in study.methods
    ]


def run_folder(study: Study, unit: Unit) -> Path:
    return study.output_path / unit.folder


def results(study: Study, unit: Unit) -> dict[str, Any] | None:
    """What a finished run measured, None while it isn't finished."""
    path = run_folder(study, unit) / RESULTS_FILE
    advice = "delete it to have the run measured again"
    try:
        values = read_object(path, (), advice)
    except FileNotFoundError:
        return None
    if DIVERGED not in values:
        check_keys(path, values, ("test" if unit.tried_rate is None else "untested", *_RESULTS), advice)
    return values


def weights(study: Study, backbone: str) -> str | None:
    """The folder of the weights that the study trained for a backbone with its present settings, None before."""
    folder = Path(study.output_dir) / Unit(backbone).folder
    settings = dataclasses.asdict(study.scratch(backbone))
    for record in sorted(folder.expanduser().glob("backbone-*/training.json")):
        if ".unfinished" not in record.parent.name:
            training = read_object(record, ("settings", "seed"), f"delete {record.parent} to have it trained again")
            if (training["settings"], training["seed"]) == (settings, BACKBONE_SEED):
                return str(folder / record.parent.name)
    return None


def is_done(study: Study, unit: Unit) -> bool:
    if unit.method is None:
        return weights(study, unit.backbone) is not None
    return (run_folder(study, unit) / RESULTS_FILE).is_file()


def prune(study: Study, unit: Unit) -> None:
    """Remove what a finished run needs no more: checkpoints, and weights that the study doesn't keep.

    Of the runs that tried learning rates, numbers alone stay, once the cell that goes on from one of them is done.
    """
    folder = run_folder(study, unit)
    if unit.method is None or not is_done(study, unit):
        return
    if unit.tried_rate is not None:
        if not is_done(study, Unit(unit.backbone, unit.method, unit.fold, unit.seed)):
            return
        dropped = {ADAPTER_FOLDER, MODEL_FOLDER}
    else:
        kept = {"models": {ADAPTER_FOLDER, MODEL_FOLDER}, "adapters": {ADAPTER_FOLDER}, "nothing": set()}[study.keep]
        dropped = {ADAPTER_FOLDER, MODEL_FOLDER} - kept
    for entry in [*folder.glob("checkpoint-*"), *(folder / name for name in dropped)]:
        shutil.rmtree(entry, ignore_errors=True)  # another process of the study may be at it


def log_file(study: Study, unit: Unit) -> Path:
    """Where the run's terminal output goes."""
    return study.output_path / _WORK_FOLDER / f"{unit.folder}.log"


def lock_file(study: Study, name: str) -> Path:
    return study.output_path / _WORK_FOLDER / f"{name}.lock"


def record_failure(study: Study, unit: Unit, error: str) -> None:
    path = _failure_file(study, unit)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"error": error, "time": time.time()}) + "\n")


def failure(study: Study, unit: Unit, since: float = 0.0) -> str | None:
    """The error of the unit's last attempt, None where there was none after the time `since` (seconds of the epoch)."""
    path = _failure_file(study, unit)
    try:
        record = read_object(path, ("error", "time"), "delete it to have the run tried again")
    except FileNotFoundError:
        return None
    return str(record["error"]) if record["time"] >= since else None


def forget_failure(study: Study, unit: Unit) -> None:
    _failure_file(study, unit).unlink(missing_ok=True)


def _failure_file(study: Study, unit: Unit) -> Path:
    return study.output_path / _WORK_FOLDER / f"{unit.folder}.failed"
