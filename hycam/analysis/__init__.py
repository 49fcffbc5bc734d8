"""Plots of runs, and what they show."""

from hycam.analysis.modulation import prompt_modulation
from hycam.analysis.plots import plot_expert_load, plot_loss_curves, plot_modulation
from hycam.analysis.report import write_plots

__all__ = ["plot_expert_load", "plot_loss_curves", "plot_modulation", "prompt_modulation", "write_plots"]
