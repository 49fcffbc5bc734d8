"""Which measurements a report needs: kept ones, or made where the study's runs are at hand."""

from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

from hycam.data.cache import digest
from hycam.reporting.records import Cell, Record, cell_folder, finished_cells
from hycam.reporting.runs import (
    RunFolder,
    measure_modulation,
    measure_text,
    measure_tokens,
    measure_value_states,
    measurement_settings,
    token_places,
)
from hycam.reporting.store import Store
from hycam.study.units import Unit

Values = dict[str, Any]


class Measurements:
    """A study's measurements beside its record.

    Args:
        study: its folder.
        record: its `study.json`.
        store: keeps the measurements.
        announce: is told what is about to be measured, a line each.
        hide_text: measure the modulation without the rows' text.

    Attributes:
        runs: a cell's folder in the study's -> its run, of the cells whose folders are there.
        tokens: backbone -> fold -> what `measure_tokens` returns.
        text: a backbone's name or a cell's folder -> what `measure_text` returns.
        value_states, modulation: backbone -> what `measure_value_states` and `measure_modulation` return of the first
            run of the study's reference.
        missing: what is neither kept nor could be measured, and why.
    """

    def __init__(
        self, study: Path, record: Record, store: Store, announce: Callable[[str], object], *, hide_text: bool = False
    ) -> None:
        self.record = record
        self.store = store
        self.announce = announce
        self.hide_text = hide_text
        self.runs = {
            name: RunFolder(study / name, study / Unit(cell["backbone"]).folder)
            for cell in record["cells"]
            if cell["status"] == "done" and (study / (name := cell_folder(cell))).is_dir()
        }
        self.tokens: dict[str, dict[int, Values]] = {}
        self.text: dict[str, Values] = {}
        self.value_states: dict[str, Values] = {}
        self.modulation: dict[str, Values] = {}
        self.missing: list[str] = []

    def make(self, backbone: str, texts: list[str] | None) -> None:
        """All of a backbone's; without `texts` the forgetting is what is kept."""
        by_method = finished_cells(self.record, backbone)
        cells = [cell for of_method in by_method.values() for cell in of_method]
        study = self.record["study"]
        # the backbone alone is measured as the study has it, where any method does
        plain = [cell for cell in cells if not study["methods"][cell["method"]].get("backbone")] or cells
        self._tokens(backbone, plain)
        self._text(backbone, cells, texts, plain)
        reference = by_method.get(study["reference"])
        if reference and study["methods"][study["reference"]].get("name", "hycam") == "hycam":
            self._reference(reference[0])

    def _tokens(self, backbone: str, cells: list[Cell]) -> None:
        of_folds = self.tokens.setdefault(backbone, {})
        for fold in sorted({cell["fold"] for cell in cells}):
            run = self._any_run(cell for cell in cells if cell["fold"] == fold)
            if run is not None and run.recipe.data.streaming is not None:
                self.missing.append(f"tokens of {backbone}/fold{fold}: data.streaming keeps no rows to count them in")
                continue
            inputs = None if run is None else run.token_inputs
            measure = None if run is None else partial(measure_tokens, run)
            values = self._get("tokens", f"{backbone}/fold{fold}", inputs, measure)
            if values is not None:
                of_folds[fold] = values

    def _text(self, backbone: str, cells: list[Cell], texts: list[str] | None, plain: list[Cell]) -> None:
        if texts is None:
            kept = self.store.all("forgetting")
            names = [backbone, *map(cell_folder, cells)]
            values = {name: kept[name]["value"] for name in names if name in kept}
            if backbone not in values:
                self.missing.append(f"forgetting of {backbone}: no --text given")
                return
        else:
            values = self._measured_text(backbone, cells, texts, plain)
        for name, value in values.items():
            if value["texts"] == values[backbone]["texts"]:
                self.text[name] = value
            else:
                self.missing.append(f"forgetting of {name}: measured on another text")

    def _measured_text(
        self, backbone: str, cells: list[Cell], texts: list[str], plain: list[Cell]
    ) -> dict[str, Values]:
        given = {"texts": digest(texts)}
        run = self._any_run(plain)
        inputs = None if run is None else run.token_inputs["settings"] | given
        base = None if run is None else partial(measure_text, run, texts, adapted=False)
        values = {backbone: self._get("forgetting", backbone, inputs, base)}
        for cell in cells:
            name = cell_folder(cell)
            run = self.runs.get(name)
            adapted = partial(measure_text, run, texts, adapted=True) if run is not None and run.has_weights else None
            values[name] = self._get("forgetting", name, None if run is None else run.inputs | given, adapted)
        return {name: value for name, value in values.items() if value is not None}

    def _reference(self, cell: Cell) -> None:
        name = cell_folder(cell)
        run = self.runs.get(name)
        model = cache(run.model) if run is not None and run.has_weights else None
        hidden = {"hide_text": True} if self.hide_text else {}
        for kind, measured, options, kept in (
            ("value_states", measure_value_states, {}, self.value_states),
            ("modulation", partial(measure_modulation, hide_text=self.hide_text), hidden, self.modulation),
        ):
            inputs = None if run is None else run.inputs | measurement_settings() | options
            values = self._get(kind, name, inputs, None if model is None else partial(_of_model, measured, run, model))
            if values is not None:
                kept[cell["backbone"]] = values
        if self.hide_text and cell["backbone"] in self.modulation:
            self._hide_text(cell["backbone"], name)

    def _hide_text(self, backbone: str, name: str) -> None:
        """Where the run is not there to be measured again, what was kept with the text has lost none of it."""
        tasks = self.modulation[backbone]["tasks"].values()
        if any("first" not in task for task in tasks):
            del self.modulation[backbone]
            self.missing.append(f"modulation of {name}: kept without its tokens' places, and so not without their text")
            return
        for task in tasks:
            task["tokens"] = token_places(task["first"], len(task["tokens"]))

    def _any_run(self, cells: Iterable[Cell]) -> RunFolder | None:
        return next((self.runs[name] for cell in cells if (name := cell_folder(cell)) in self.runs), None)

    def _get(self, kind: str, key: str, inputs: Values | None, measure: Callable[[], Values] | None) -> Values | None:
        def announced() -> Values:
            assert measure is not None
            self.announce(f"measuring {kind}: {key}")
            return measure()

        values = self.store.get(kind, key, inputs, None if measure is None else announced)
        if values is None:
            self.missing.append(f"{kind} of {key}: its run is not there, or its weights are not")
        return values


def _of_model(measure: Callable[..., Values], run: RunFolder | None, model: Callable[[], Any]) -> Values:
    """The measurement of a model that is loaded with the first."""
    return measure(run, model())
