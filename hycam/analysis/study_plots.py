"""Figures over several runs, each from plain values alone."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hycam.analysis.plots import layer_label, token_label
from hycam.errors import InputError

_LINE_STYLES = ("-", "--", ":")
_COLORS = 10


def method_curves(curves: Mapping[str, Mapping[str, Mapping[str, Sequence[Any]]]]) -> Figure:
    """Training and validation loss of each method over the optimiser's steps: the mean over runs, and its spread.

    Args:
        curves: method -> `training` and `validation`, each with `step`, `mean` and `std`, lists of one length; a `std`
            that is None, of a single run, has no band.

    Raises:
        InputError: no method has a point.
    """
    if not any(curve["step"] for kinds in curves.values() for curve in kinds.values()):
        raise InputError("curves: no method has a loss, at least one is wanted")
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, kind in zip(panels, ("training", "validation"), strict=True):
        for index, (method, kinds) in enumerate(curves.items()):
            _band(axes, kinds[kind], index, method)
        axes.set(title=f"{kind} loss", xlabel="optimiser step", ylabel="loss (nats per token that it is taken on)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    panels[1].legend(fontsize="small")
    figure.suptitle("Loss per method: mean over the runs, shaded by one standard deviation")
    return figure


def _band(axes: Axes, curve: Mapping[str, Sequence[Any]], index: int, label: str) -> None:
    color, style = f"C{index % _COLORS}", _LINE_STYLES[index // _COLORS % len(_LINE_STYLES)]
    mean = np.array(curve["mean"], dtype=float)
    axes.plot(curve["step"], mean, color=color, linestyle=style, linewidth=1.5, label=label)
    spread = np.array(curve["std"], dtype=float)  # None becomes nan, which fills nothing
    axes.fill_between(curve["step"], mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0)


def sweep(points: Sequence[Mapping[str, Any]], label: str) -> Figure:
    """Test perplexity against a setting, with one standard deviation over runs.

    Args:
        points: each with `value`, `mean` and `std` (None for a single run).
        label: the setting, for the axis.

    Raises:
        InputError: no point.
    """
    if not points:
        raise InputError("points: none given, at least one is wanted")
    ordered = sorted(points, key=lambda point: point["value"])
    values = [point["value"] for point in ordered]
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    spread = [math.nan if point["std"] is None else point["std"] for point in ordered]
    axes.errorbar(values, [point["mean"] for point in ordered], yerr=spread, marker="o", capsize=4, linewidth=1.5)
    axes.set_xticks(values, [str(value) for value in values])
    axes.set(title=f"Test perplexity by {label}", xlabel=label, ylabel="perplexity, all tasks")
    axes.grid(alpha=0.3)
    return figure


def value_states(embeddings: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """Scatter plots of embedded rows coloured by task, one panel for each model.

    Args:
        embeddings: model -> what `embed_value_states` returns.
        title: of the figure: which layer.

    Raises:
        InputError: no model.
    """
    if not embeddings:
        raise InputError("embeddings: none given, at least one is wanted")
    figure = Figure(figsize=(1.2 + 4.8 * len(embeddings), 5), layout="constrained")
    panels = figure.subplots(1, len(embeddings), squeeze=False)[0]
    for axes, (model, embedding) in zip(panels, embeddings.items(), strict=True):
        for index, (task, points) in enumerate(embedding["points"].items()):
            axes.scatter(*zip(*points, strict=True), s=12, alpha=0.7, color=f"C{index % _COLORS}", label=task)
        silhouette = embedding["silhouette"]
        shown = "" if silhouette is None else f" (silhouette of the tasks: {silhouette:.3f})"
        axes.set_title(f"{model}{shown}", fontsize="medium", parse_math=False)
        axes.set_xticks([])
        axes.set_yticks([])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")
    figure.suptitle(title)
    return figure


def task_modulation(tasks: Mapping[str, Mapping[str, Any]], features: Sequence[int], title: str) -> Figure:
    """A_fusion (equation 11) over tokens and features: a row of panels for each task, a column for each layer.

    Args:
        tasks: task -> `tokens`, their texts, and `layers`: module path -> [tokens][features] values.
        features: the index of each feature that is shown.
        title: of the figure.

    Raises:
        InputError: no task, or no layer.
    """
    layers = list(next(iter(tasks.values()))["layers"]) if tasks else []
    if not layers:
        raise InputError(f"tasks: {len(tasks)} given and no layer, at least one of both is wanted")
    strengths = np.sort(np.concatenate([np.abs(v).ravel() for task in tasks.values() for v in task["layers"].values()]))
    # all but the strongest hundredth: single outliers would wash out the rest
    limit = float(strengths[int(0.99 * (len(strengths) - 1))]) or 1.0
    heights = [len(task["tokens"]) for task in tasks.values()]
    size = (2.4 + 3.4 * len(layers), 1.5 + 0.15 * sum(heights) + 0.4 * len(tasks))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(
        len(tasks), len(layers), squeeze=False, sharex=True, sharey="row", gridspec_kw={"height_ratios": heights}
    )
    for row, (name, task) in zip(grid, tasks.items(), strict=True):
        for axes, (layer, values) in zip(row, task["layers"].items(), strict=True):
            image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
            axes.set_title(f"{name}, {layer_label(layer)}", fontsize="small", parse_math=False)
        labels = [token_label(token) for token in task["tokens"]]
        row[0].set_yticks(range(len(labels)), labels, fontsize=6, family="monospace", parse_math=False)
    every = max(1, len(features) // 4)
    grid[-1][0].set_xticks(range(0, len(features), every), [str(feature) for feature in features[::every]])
    figure.suptitle(title)
    figure.supxlabel("feature")
    figure.supylabel("token")
    label = "modulation (0: as in the backbone)"
    figure.colorbar(image, ax=grid.ravel().tolist(), label=label, aspect=40, extend="both")
    return figure
