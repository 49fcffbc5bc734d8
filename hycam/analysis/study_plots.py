"""Figures over several runs, each from plain values alone."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from hycam.analysis.plots import (
    MODULATION_COLORS,
    drop_panels,
    layer_label,
    modulation_bar,
    modulation_scale,
    token_label,
)
from hycam.errors import InputError

Curves = Mapping[str, Mapping[str, Mapping[str, Sequence[Any]]]]  # method -> training, validation -> step, mean, std

_LINE_STYLES = ("-", "--", ":")
_COLORS = 10
_PANELS_IN_A_ROW = 4


def method_curves(curves: Curves) -> Figure:
    """Training and validation loss of each method over the optimiser's steps: the means over its runs side by side, and
    below, where there are several, each method's spread in a panel of its own.

    Args:
        curves: method -> `training` and `validation`, each with `step`, `mean` and `std`, lists of one length; a `std`
            that is None, of a single run, has no band.

    Raises:
        InputError: no method has a point.
    """
    if not any(curve["step"] for kinds in curves.values() for curve in kinds.values()):
        raise InputError("curves: no method has a loss, at least one is wanted")
    spread = [m for m, kinds in curves.items() if any(s is not None for kind in kinds.values() for s in kind["std"])]
    rows = math.ceil(len(spread) / _PANELS_IN_A_ROW)
    heights = [4.8, 2.4 * rows] if rows else [4.8]
    figure = Figure(figsize=(13, sum(heights)), layout="constrained")
    title = "Loss per method: mean over the runs"
    figure.suptitle(f"{title}, below shaded by one standard deviation" if rows else title)
    top, *below = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights).ravel()
    _means(top, curves)
    for part in below:
        _spreads(part, curves, spread)
    return figure


def _means(figure: SubFigure, curves: Curves) -> None:
    panels = figure.subplots(1, 2)
    for axes, kind in zip(panels, ("training", "validation"), strict=True):
        for index, (method, kinds) in enumerate(curves.items()):
            _curve(axes, kinds[kind], **_line(index), linewidth=1.5, label=method)
        axes.set(title=f"{kind} loss", xlabel="optimiser step", ylabel="loss (nats per token that it is taken on)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")


def _spreads(figure: SubFigure, curves: Curves, methods: Sequence[str]) -> None:
    """A panel for each of the methods: its two curves with their bands, over everyone's validation means in grey."""
    columns = min(len(methods), _PANELS_IN_A_ROW)
    grid = (
        figure.subplots(math.ceil(len(methods) / columns), columns, squeeze=False, sharex=True, sharey=True)
        .ravel()
        .tolist()
    )
    for axes, method in zip(grid, methods, strict=False):
        for kinds in curves.values():
            _curve(axes, kinds["validation"], color="0.8", linewidth=0.8)
        color = _line(list(curves).index(method))["color"]
        for kind, style in (("training", ":"), ("validation", "-")):
            _band(axes, curves[method][kind], color, style)
        axes.set_title(method, fontsize="small", parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.grid(alpha=0.3)
    drop_panels(list(grid), len(methods), columns)
    figure.supxlabel(
        "optimiser step (dotted: training; solid: validation; grey: the validation of all)", fontsize="medium"
    )
    figure.supylabel("loss", fontsize="medium")


def _line(index: int) -> dict[str, str]:
    return {"color": f"C{index % _COLORS}", "linestyle": _LINE_STYLES[index // _COLORS % len(_LINE_STYLES)]}


def _curve(axes: Axes, curve: Mapping[str, Sequence[Any]], **style: Any) -> None:
    """The means; a single one, of which no line is drawn, as a point."""
    axes.plot(curve["step"], _numbers(curve["mean"]), marker="o" if len(curve["step"]) == 1 else "", **style)


def _band(axes: Axes, curve: Mapping[str, Sequence[Any]], color: str, style: str) -> None:
    mean, spread = _numbers(curve["mean"]), _numbers(curve["std"])
    _curve(axes, curve, color=color, linestyle=style, linewidth=1.5)
    axes.fill_between(curve["step"], mean - spread, mean + spread, color=color, alpha=0.25, linewidth=0)


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    """None becomes nan, which draws nothing."""
    return np.array(values, dtype=float)


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
    scale = modulation_scale([values for task in tasks.values() for values in task["layers"].values()])
    heights = [len(task["tokens"]) for task in tasks.values()]
    size = (2.4 + 3.4 * len(layers), 1.5 + 0.15 * sum(heights) + 0.4 * len(tasks))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(
        len(tasks), len(layers), squeeze=False, sharex=True, sharey="row", gridspec_kw={"height_ratios": heights}
    )
    for row, (name, task) in zip(grid, tasks.items(), strict=True):
        for axes, (layer, values) in zip(row, task["layers"].items(), strict=True):
            image = axes.imshow(values, cmap=MODULATION_COLORS, norm=scale, aspect="auto", interpolation="nearest")
            axes.set_title(f"{name}, {layer_label(layer)}", fontsize="small", parse_math=False)
        labels = [token_label(token) for token in task["tokens"]]
        row[0].set_yticks(range(len(labels)), labels, fontsize=6, family="monospace", parse_math=False)
    every = max(1, len(features) // 4)
    grid[-1][0].set_xticks(range(0, len(features), every), [str(feature) for feature in features[::every]])
    figure.suptitle(title)
    figure.supxlabel("feature")
    figure.supylabel("token")
    modulation_bar(figure, grid.ravel().tolist(), image)
    return figure
