"""A study's figures, each from a JSON file of its own that holds all it shows."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hycam.analysis.plots import plot_expert_load
from hycam.analysis.study_plots import plot_method_curves, plot_sweep, plot_task_modulation, plot_value_states
from hycam.errors import InputError

# `figure` in the data -> what draws it
_PLOTS: dict[str, Callable[[Mapping[str, Any], Path], None]] = {
    "loss_curves": lambda data, path: plot_method_curves(data["curves"], path),
    "sweep": lambda data, path: plot_sweep(data["points"], data["label"], path),
    "expert_load": lambda data, path: plot_expert_load(data["loads"], path),
    "modulation": lambda data, path: plot_task_modulation(data["tasks"], data["features"], data["title"], path),
    "value_states": lambda data, path: plot_value_states(data["embeddings"], data["title"], path),
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
        plot = _PLOTS[data["figure"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no figure's data: {error!r}; wanted `figure`: {', '.join(_PLOTS)}") from error
    files = [path.with_name(f"{path.stem}.{suffix}") for suffix in ("png", "svg")]
    for file in files:
        plot(data, file)
    return files
