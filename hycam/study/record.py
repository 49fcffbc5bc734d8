"""`study.json`: what a study's finished runs measured, in one small file that the tables and figures are made of."""

import json
from typing import Any

from hycam.errors import InputError
from hycam.locks import claim
from hycam.study.recipe import Study
from hycam.study.units import (
    DIVERGED,
    Unit,
    best_rate,
    cells,
    failure,
    lock_file,
    results,
    run_folder,
    tuning,
    validation_loss,
    weights,
)
from hycam.training.callbacks import finite, read_metrics, write_whole
from hycam.training.folder import METRICS_FILE, RECORD_FILE, read_record

STUDY_RECORD = "study.json"
# what an earlier version would read wrongly raises it
FORMAT_VERSION = 1

_TEST_METRICS = ("perplexity", "row_average", "nll", "tokens", "bleu4", "rougeL", "rows", "too_long")


def chosen_rate(study: Study, backbone: str, method: str) -> float | None:
    """The rate that a method is trained with: its only one, or `best_rate` of its grid."""
    rates = study.rates(method)
    if len(rates) == 1:
        return rates[0]
    grid = [run for run in tuning(study) if (run.backbone, run.method) == (backbone, method)]
    return best_rate(study, grid)


def write_record(study: Study) -> dict[str, Any]:
    """Collect the record and write it whole, one process at a time."""
    with claim(lock_file(study, "study"), wait=True):
        record = collect(study)
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        write_whole(study.output_path / STUDY_RECORD, text)
    return record


def collect(study: Study) -> dict[str, Any]:
    """The record of what the study's folder holds.

    Returns:
        `format_version`. `study`: the recipe. `planned`: the number of cells. `cells`: those that are done, or failed
        when they were last tried. `tuning`: the runs of the learning-rate grids. `data`: per fold and task the rows of
        each split and the SHA-256 of all. `backbones`: parameters, and the training of those from scratch. `versions`,
        `devices`: each combination that a run was made with.

    Raises:
        InputError: two cells saw other rows.
    """
    collected = [entry for unit in cells(study) if (entry := _cell(study, unit)) is not None]
    finished = {unit: values for unit in cells(study) if (values := results(study, unit)) is not None}
    record = {
        "format_version": FORMAT_VERSION,
        "study": study.to_dict(),
        "planned": len(cells(study)),
        "cells": collected,
        "tuning": [entry for unit in tuning(study) if (entry := _tuning(study, unit)) is not None],
        "data": _data(study),
        "backbones": {name: entry for name in study.backbones if (entry := _backbone(study, name))},
        "versions": _distinct([values["versions"] for values in finished.values()]),
        "devices": _distinct([values["devices"] for values in finished.values()]),
    }
    plain: dict[str, Any] = finite(record)
    return plain


def _cell(study: Study, unit: Unit) -> dict[str, Any] | None:
    name = {"backbone": unit.backbone, "method": unit.method, "fold": unit.fold, "seed": unit.seed}
    measured = results(study, unit)
    if measured is None:
        error = failure(study, unit)
        return None if error is None else name | {"status": "failed", "error": error}
    metrics = run_folder(study, unit) / METRICS_FILE
    lines = read_metrics(metrics)
    if not lines or lines[-1]["step"] != measured["steps"]:
        raise InputError(
            f"{metrics}: damaged: it ends before step {measured['steps']}, the run's last; delete {metrics.parent} to "
            "have the run made again"
        )
    entry = name | {
        "status": "done",
        "learning_rate": measured["recipe"]["trainer"]["learning_rate"],
        "test": _test(measured["test"]["adapted"]),
        "base": _test(measured["test"]["base"]),
        "parameters": measured["parameters"],
        "train_seconds": sum(line["seconds"] for line in lines if "seconds" in line),
        "peak_bytes": max((line["peak_bytes"] for line in lines if "peak_bytes" in line), default=0),
        "steps": measured["steps"],
        "best_step": measured["best_step"],
        "curves": {key: [[line["step"], line[key]] for line in lines if key in line] for key in ("loss", "eval_loss")},
    }
    return entry | {key: measured[key] for key in ("saved_bytes", "expert_load") if key in measured}


def _test(report: dict[str, Any]) -> dict[str, Any]:
    """Metrics of a test split per task and overall; `loss` is the negative log-likelihood per token, in nats.

    None where a number is not finite.
    """

    def chosen(values: dict[str, Any]) -> dict[str, Any]:
        kept = {key: values[key] for key in _TEST_METRICS if key in values}
        return {"loss": None if kept["nll"] is None else kept["nll"] / kept["tokens"]} | kept

    return {
        "tasks": {name: chosen(values) for name, values in report["tasks"].items()},
        "overall": chosen(report["overall"]),
    }


def _tuning(study: Study, unit: Unit) -> dict[str, Any] | None:
    name = {"backbone": unit.backbone, "method": unit.method, "learning_rate": unit.tried_rate}
    measured = results(study, unit)
    if measured is None:
        error = failure(study, unit)
        return None if error is None else name | {"status": "failed", "error": error}
    if DIVERGED in measured:
        return name | {"status": DIVERGED, "error": measured[DIVERGED], "validation_loss": None}
    numbers = {key: measured[key] for key in ("steps", "best_step")}
    return name | {"status": "done", "validation_loss": validation_loss(study, unit), **numbers}


def _data(study: Study) -> dict[str, Any]:
    """Per fold, the fingerprint of every task's rows, which is one for all cells."""
    data: dict[str, Any] = {}
    first: dict[str, Unit] = {}
    for unit in cells(study):
        folder = run_folder(study, unit)
        if not (folder / RECORD_FILE).is_file():
            continue
        seen = read_record(folder)["data"]
        fold = str(unit.fold)
        if seen != data.setdefault(fold, seen):
            task = next(name for name in seen if seen[name] != data[fold].get(name))
            raise InputError(f"{unit.folder}: the rows of {task} are not those of {first[fold].folder}")
        first.setdefault(fold, unit)
    return data


def _backbone(study: Study, name: str) -> dict[str, Any]:
    if study.backbones[name].get("scratch") is None:
        return {"name_or_path": study.backbones[name]["name_or_path"]}
    folder = weights(study, name)
    if folder is None:
        return {}
    path = study.output_path / "backbones" / name / folder.rpartition("/")[2] / "training.json"
    training: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return training


def _distinct(values: list[Any]) -> list[Any]:
    return [value for index, value in enumerate(values) if value not in values[:index]]
