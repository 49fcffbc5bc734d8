"""Whole models measured by method: backbones of known shapes, training steps, generation, the longest row."""
