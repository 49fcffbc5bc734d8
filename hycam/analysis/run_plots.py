"""The plots that a run leaves in its folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hycam.analysis.plots import plot_expert_load, plot_loss_curves, plot_modulation


def write_plots(
    folder: Path,
    *,
    metrics: Sequence[Mapping[str, Any]],
    loads: Mapping[str, Mapping[str, Sequence[float]]] | None,
    modulation: Mapping[str, torch.Tensor] | None,
    tokens: Sequence[str],
) -> list[Path]:
    """`loss.png` where a loss was logged, and where they are given `modulation.png` and `expert_load.png` in `folder`.

    Args:
        folder: made where it is missing.
        metrics, loads, modulation, tokens: see `plot_loss_curves`, `plot_expert_load` and `plot_modulation`.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    if any(
        "loss" in event or "eval_loss" in event for event in metrics
    ):  # a run may be shorter than its logs' distance
        files.append(folder / "loss.png")
        plot_loss_curves(metrics, files[-1])
    if modulation is not None:
        files.append(folder / "modulation.png")
        plot_modulation(modulation, tokens, files[-1])
    if loads is not None:
        files.append(folder / "expert_load.png")
        plot_expert_load(loads, files[-1])
    return files
