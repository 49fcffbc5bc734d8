"""A study's figures, each from a JSON file of its own that holds all it shows."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hycam.analysis.plots import expert_load, save
from hycam.analysis.study_plots import method_curves, sweep, task_modulation, value_states
from hycam.errors import InputError

# `figure` in the data -> what draws it
_FIGURES: dict[str, Callable[[Mapping[str, Any]], Figure]] = {
    "loss_curves": lambda data: method_curves(data["curves"]),
    "sweep": lambda data: sweep(data["points"], data["label"]),
    "expert_load": lambda data: expert_load(data["loads"]),
    "modulation": lambda data: task_modulation(data["tasks"], data["features"], data["title"]),
    "value_states": lambda data: value_states(data["embeddings"], data["title"]),
}


def draw_figure(path: Path) -> list[Path]:
    """Draw the PNG and the SVG beside a figure's JSON file, from that file alone.

    Returns:
        The two files.

    Raises:
        InputError: a file that can't be read, or holds no figure.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        draw = _FIGURES[data["figure"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no figure's data: {error!r}; wanted `figure`: {', '.join(_FIGURES)}") from error
    figure = draw(data)
    files = [path.with_name(f"{path.stem}.{suffix}") for suffix in ("png", "svg")]
    for file in files:
        save(figure, file)
        figure.set_layout_engine("none")  # the first has found the layout
    return files
