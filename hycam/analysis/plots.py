"""Plots of a run, as PNG or SVG by the file's name. Each function draws one figure of its own: pyplot's global state is
never touched.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from hycam.errors import InputError

_DPI = 120
_PANELS_IN_A_ROW = 4
_MOST_ANNOTATED_PANELS = 8
_MOST_TOKEN_LABELS = 80
_LABEL_LENGTH = 14
_LEAST_UNEVEN = 0.05
_WIDE = 3.0
_DARK = 0.7
_ENDS = (0.01, 0.99)
MODULATION_COLORS = "RdBu_r"


def plot_loss_curves(metrics: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Training loss and validation loss, overall and per task, over the optimiser's steps.

    Where the losses differ by more than a factor of 3 their axis is logarithmic: the first ones, or a hard task's,
    would flatten the others.

    Args:
        metrics: log events with `step` and `loss`, or `step`, `eval_loss` and `eval_<task>_loss`, as in a run's
            `metrics.jsonl`; others are passed over. A loss that is None (not finite) leaves a gap.
        path: the file, .png or .svg.

    Raises:
        InputError: no event has a loss.
    """
    training = _curve(metrics, "loss")
    validation = _curve(metrics, "eval_loss")
    if not training and not validation:
        raise InputError("metrics: no event has a loss, at least one is wanted")
    names = {key for event in metrics for key in event if key.startswith("eval_") and key.endswith("_loss")}
    tasks = sorted(names - {"eval_loss"})
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    if training:
        axes.plot(*zip(*training, strict=True), color="0.6", linewidth=1.2, label="training, all tasks")
    for index, key in enumerate(tasks):
        label = f"validation, {key.removeprefix('eval_').removesuffix('_loss')}"
        points = zip(*_curve(metrics, key), strict=True)
        axes.plot(*points, color=f"C{index}", marker=".", linewidth=1, label=label)
    if validation:
        points = zip(*validation, strict=True)
        axes.plot(*points, color="black", marker="o", markersize=4, linewidth=2, label="validation, all tasks")
    axes.set(title="Loss during training", xlabel="optimiser step", ylabel="loss (nats per response token)")
    losses = [loss for key in ("loss", "eval_loss", *tasks) for _, loss in _curve(metrics, key) if loss > 0]
    if losses and max(losses) > _WIDE * min(losses):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    save(figure, path)


def save(figure: Figure, path: str | Path) -> None:
    """Write the figure; the same figure gives the same file."""
    # an SVG's ids are random and it has its date, unless told otherwise
    with matplotlib.rc_context({"svg.hashsalt": "hycam"}):
        figure.savefig(path, dpi=_DPI, metadata={"Date": None} if Path(path).suffix == ".svg" else None)


def _curve(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(e["step"], math.nan if e[key] is None else e[key]) for e in metrics if key in e and "step" in e]


def plot_expert_load(loads: Mapping[str, Mapping[str, Sequence[float]]], path: str | Path) -> None:
    """Write `expert_load` to a file, .png or .svg."""
    save(expert_load(loads), path)


def expert_load(loads: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Mean expert weights per task and expert, one panel for each adapted layer.

    Args:
        loads: what `evaluate_expert_load` returns.

    Raises:
        InputError: no task, or no layer.
    """
    tasks = list(loads)
    layers = list(loads[tasks[0]]) if tasks else []
    if not layers:
        raise InputError(f"loads: {len(tasks)} tasks and no layer given, at least one of both is wanted")
    experts = len(loads[tasks[0]][layers[0]])
    every = [value for of_task in loads.values() for load in of_task.values() for value in load]
    # white is the even share; shares that are all but even stay pale
    furthest = max(_LEAST_UNEVEN, *(abs(value - 1 / experts) for value in every))
    scale = CenteredNorm(1 / experts, furthest)
    panel = (1.0 + 0.66 * experts, 1.0 + 0.42 * len(tasks))
    figure, panels = _panels(len(layers), panel, left=0.09 * max(map(len, tasks)), bottom=0.5)
    for axes, layer in zip(panels, layers, strict=True):
        values = [list(loads[task][layer]) for task in tasks]
        image = axes.imshow(values, cmap=MODULATION_COLORS, norm=scale, aspect="auto")
        axes.set_title(layer_label(layer), fontsize="medium")
        axes.set_xticks(range(experts))
        axes.set_yticks(range(len(tasks)), tasks, parse_math=False)
        if len(layers) <= _MOST_ANNOTATED_PANELS:
            _annotate(axes, values, scale)
    figure.suptitle(f"Share of each task's tokens that each expert takes (white: the even share, {1 / experts:.2f})")
    figure.supxlabel("expert")
    figure.supylabel("task")
    bar = figure.colorbar(image, ax=panels, label="mean expert weight", aspect=30, pad=0.01)
    bar.ax.set_ylim(max(0.0, 1 / experts - furthest), min(1.0, 1 / experts + furthest))
    return figure


def _annotate(axes: Axes, values: list[list[float]], scale: CenteredNorm) -> None:
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            color = "white" if abs(2 * scale(value) - 1) > _DARK else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize="medium")


def plot_modulation(modulation: Mapping[str, torch.Tensor], tokens: Sequence[str], path: str | Path) -> None:
    """A_fusion (equation 11) over the tokens and features of one prompt, one panel for each layer given.

    Args:
        modulation: layer -> [tokens, features], any float dtype.
        tokens: the text of each token.
        path: the file, .png or .svg.

    Raises:
        InputError: no layer, or a layer with another number of tokens.
    """
    if not modulation:
        raise InputError("modulation: no layer given, at least one is wanted")
    values = {layer: tensor.detach().float().cpu() for layer, tensor in modulation.items()}
    for layer, tensor in values.items():
        if tensor.ndim != 2 or len(tensor) != len(tokens):
            raise InputError(
                f"modulation: {layer}: shape {list(tensor.shape)} given, [{len(tokens)}, features] is wanted"
            )
    scale = modulation_scale([tensor.numpy() for tensor in values.values()])
    every = math.ceil(len(tokens) / _MOST_TOKEN_LABELS)
    height = max(3.0, 0.15 * len(tokens) / every)
    figure, panels = _panels(len(values), (3.2, height), left=0.9, bottom=0.5)
    for axes, (layer, tensor) in zip(panels, values.items(), strict=True):
        image = axes.imshow(tensor.numpy(), cmap=MODULATION_COLORS, norm=scale, aspect="auto", interpolation="nearest")
        axes.set_title(layer_label(layer), fontsize="medium")
        positions = range(0, len(tokens), every)
        labels = [token_label(tokens[position]) for position in positions]
        axes.set_yticks(positions, labels, fontsize=7, family="monospace", parse_math=False)
    figure.suptitle("Modulation of the attention's output, $A_\\mathrm{fusion}$")
    figure.supxlabel("feature")
    figure.supylabel("token")
    modulation_bar(figure, panels, image)
    save(figure, path)


def modulation_scale(values: Sequence[Any]) -> TwoSlopeNorm:
    """One scale of colours for all the arrays, white at 0 and either side as wide as its own values.

    SiLU hardly goes below 0: were both sides as wide as the positive one, half of the colours would stay unused. The
    ends are the 1st and the 99th percentile: single outliers would wash out the rest.
    """
    every = np.concatenate([np.asarray(array, dtype=float).ravel() for array in values] or [np.zeros(1)])
    low, high = (float(end) for end in np.quantile(every, _ENDS))
    high = high if high > 0 else -low if low < 0 else 1.0
    return TwoSlopeNorm(0.0, vmin=low if low < 0 else -high, vmax=high)


def modulation_bar(figure: Figure, panels: list[Axes], image: AxesImage) -> None:
    """The scale of the modulation, with both its ends."""
    low, high = image.get_clim()
    bar = figure.colorbar(
        image,
        ax=panels,
        label="modulation (0: as in the backbone),\neach side to a scale of its own,\n"
        "to the 1st and the 99th percentile",
        aspect=30,
        pad=0.01,
        extend="both",
    )
    bar.set_ticks([low, low / 2, 0, high / 4, high / 2, 3 * high / 4, high])
    bar.ax.yaxis.set_major_formatter("{x:.2g}")


def token_label(token: str) -> str:
    """A token's text on one line: blanks and line ends visible, long ones cut."""
    shown = token.replace(" ", "\N{OPEN BOX}").replace("\n", "\\n").replace("\t", "\\t")
    return shown if len(shown) <= _LABEL_LENGTH else shown[: _LABEL_LENGTH - 1] + "\N{HORIZONTAL ELLIPSIS}"


def layer_label(path: str) -> str:
    """`layer 3` of `model.layers.3.self_attn`, counted from 0 as there; a path without a number stays as it is."""
    numbers = [part for part in path.split(".") if part.isdecimal()]
    return f"layer {numbers[-1]}" if numbers else path


def _panels(count: int, panel: tuple[float, float], *, left: float, bottom: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels in rows, each of `panel` inches, with room on the left and at the bottom."""
    # few panels fill a page's width in two columns, and their text stays legible there
    columns = min(count, 2 if count <= _PANELS_IN_A_ROW else _PANELS_IN_A_ROW)
    rows = math.ceil(count / columns)
    size = (columns * panel[0] + left + 1.2, rows * panel[1] + bottom + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten().tolist()
    drop_panels(grid, count, columns)
    return figure, grid[:count]


def drop_panels(grid: Sequence[Axes], count: int, columns: int) -> None:
    """Remove the panels beyond the first `count`; the lowest of each column has the ticks' labels."""
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[count - columns : count]:
        axes.tick_params(labelbottom=True)
