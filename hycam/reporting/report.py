"""What `hycam report` writes: measurements, figures and tables of a study."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hycam.analysis.figures import draw_figure
from hycam.data.documents import read_documents
from hycam.errors import InputError
from hycam.reporting.measurements import Measurements
from hycam.reporting.records import Cell, finished_cells, loss_curves, read_record, sweep_points
from hycam.reporting.store import Store
from hycam.reporting.tables import analysis_tables
from hycam.study.render import Table, write_tables
from hycam.study.tables import study_tables

DATA_FOLDER, FIGURES_FOLDER = "data", "figures"
SWEEP_TABLE = "figure3"


@dataclass
class Report:
    """What was written, and what could not be and why."""

    files: list[Path] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def write_report(
    study: Path,
    output: Path,
    *,
    texts: Path | None = None,
    hide_text: bool = False,
    pictures: bool = True,
    announce: Callable[[str], object] = print,
) -> Report:
    """Measure what the study's models are needed for, and write all figures and tables.

    Args:
        study: folder of a study: `study.json`, and the runs under `cells` where models are to be measured. Without
            them everything comes from `study.json` and what `output` holds from before.
        output: the report's folder: gets `data` (measurements), `figures` (PNG, SVG, each with its JSON) and `tables`.
        texts: JSON Lines file with general text, for the forgetting.
        hide_text: keep the rows' text out of the figure of the modulation, for rows that may not be shown.
        pictures: draw the figures; False: write their data alone.
        announce: is told what is about to be measured, a line each.

    Raises:
        InputError: no study, no finished cell, a file that can't be read, or `texts` without any run.
    """
    record = read_record(study)
    measurements = Measurements(study, record, Store(output / DATA_FOLDER), announce, hide_text=hide_text)
    if texts is not None and not measurements.runs:
        raise InputError(f"--text: {study} has no run to measure, wanted its folder cells")
    documents = None if texts is None else read_documents(texts)
    backbones = {name: cells for name in record["study"]["backbones"] if (cells := finished_cells(record, name))}
    for backbone in backbones:
        measurements.make(backbone, documents)
    tables = study_tables(record)
    report = Report(missing=measurements.missing)
    (output / FIGURES_FOLDER).mkdir(parents=True, exist_ok=True)
    for backbone, cells in backbones.items():
        for name, data in _figures(record["study"]["reference"], backbone, cells, tables, measurements):
            path = output / FIGURES_FOLDER / f"{name}-{backbone}.json"
            path.write_text(json.dumps(data, allow_nan=False) + "\n", encoding="utf-8")
            report.files += [path, *(draw_figure(path) if pictures else [])]
    tables += analysis_tables(backbones, measurements)
    report.files += sorted(write_tables(output, tables).iterdir())
    return report


def _figures(
    reference: str,
    backbone: str,
    cells: Mapping[str, Sequence[Cell]],
    tables: Iterable[Table],
    measurements: Measurements,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and data of every figure of a backbone, the data as `draw_figure` takes it."""
    yield "loss_curves", {"figure": "loss_curves", "curves": loss_curves(cells)}
    for table in tables:
        points = sweep_points(table, backbone) if table.name == SWEEP_TABLE else []
        if points:
            yield "sweep", {"figure": "sweep", "label": "number of experts", "points": points}
    for method, of_method in cells.items():
        first = of_method[0]  # the experts of other runs have other meanings
        if "expert_load" in first:
            yield f"expert_load-{method}", {"figure": "expert_load", "loads": first["expert_load"]}
    states = measurements.value_states.get(backbone)
    if states is not None:
        unit = " of tokens" if "tokens" in states else ""
        which = f"layer {states['layer']} of 0 to {states['layers'] - 1}"
        title = f"t-SNE of the attention's value states{unit}, {which}"
        embeddings = {"backbone": states["base"], f"with {reference}": states["adapted"]}
        yield "value_states", {"figure": "value_states", "title": title, "embeddings": embeddings}
    modulation = measurements.modulation.get(backbone)
    if modulation is not None:
        title = "Modulation of the attention's output, $A_\\mathrm{fusion}$"
        yield "modulation", {"figure": "modulation", "title": title, **modulation}
