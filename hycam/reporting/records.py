"""What a study's figures show of its record."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hycam.errors import InputError, check_format_version
from hycam.study.record import FORMAT_VERSION, STUDY_RECORD
from hycam.study.render import Number, Table
from hycam.study.statistics import finished, summarise
from hycam.study.units import Unit
from hycam.training.folder import read_object

RECORD_KEYS = ("study", "planned", "cells", "tuning", "data", "backbones", "versions", "devices")

Cell = Mapping[str, Any]
Record = Mapping[str, Any]
Curve = Sequence[Sequence[Any]]


def read_record(folder: Path) -> Record:
    """The record of the study in a folder.

    Raises:
        InputError: a folder without one, one without a finished cell, or one that a later version wrote.
    """
    path = folder / STUDY_RECORD
    try:
        record: Record = read_object(path, RECORD_KEYS, "`hycam compare` writes it anew")
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: no {STUDY_RECORD}, wanted the folder of a study that `hycam compare` ran"
        ) from error
    check_format_version(record.get("format_version", 1), FORMAT_VERSION, f"{path}: ")
    if not any(cell["status"] == "done" for cell in record["cells"]):
        raise InputError(f"{path}: no finished cell, wanted at least one")
    return record


def finished_cells(record: Record, backbone: str) -> dict[str, list[Cell]]:
    """The finished cells of a backbone by method, in the study's order; a method without one is left out."""
    cells = {method: finished(record, backbone, method) for method in record["study"]["methods"]}
    return {method: of_method for method, of_method in cells.items() if of_method}


def cell_folder(cell: Cell) -> str:
    """A cell's folder in the study's, which names it too."""
    return Unit(cell["backbone"], cell["method"], cell["fold"], cell["seed"]).folder


def loss_curves(cells: Mapping[str, Sequence[Cell]]) -> dict[str, dict[str, dict[str, list[Any]]]]:
    """Mean and standard deviation of every method's losses over its runs, for `method_curves`.

    A step counts where all runs of the method have it: of runs that stopped early, up to the first stop.
    """
    return {
        method: {
            "training": mean_curve(cell["curves"]["loss"] for cell in runs),
            "validation": mean_curve(cell["curves"]["eval_loss"] for cell in runs),
        }
        for method, runs in cells.items()
    }


def mean_curve(curves: Iterable[Curve]) -> dict[str, list[Any]]:
    """`step`, `mean` and sample standard deviation `std` (None of a single curve) at the steps that all curves have.

    A loss of None, which was not finite, is no point.
    """
    values = [{step: loss for step, loss in curve if loss is not None} for curve in curves]
    steps = sorted(set.intersection(*(set(curve) for curve in values)))
    points = [summary for step in steps if (summary := summarise(curve[step] for curve in values)) is not None]
    return {"step": steps, "mean": [point.mean for point in points], "std": [point.std for point in points]}


def sweep_points(table: Table, backbone: str) -> list[dict[str, Any]]:
    """For `sweep`: the number of experts and the perplexity of a backbone's rows in the sweep's table."""
    perplexity = table.columns.index("PPL")
    points = []
    for row in table.rows:
        number = row.cells[perplexity]
        if row.section == backbone and isinstance(number, Number):
            points.append({"value": int(str(row.cells[0])), "mean": number.value, "std": number.std})
    return points
