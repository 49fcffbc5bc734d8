"""Plots of runs, and what they show."""
