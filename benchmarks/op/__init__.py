"""The op measured: sizes, peers, kernels, and the ways to arrange it."""
