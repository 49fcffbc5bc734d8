"""The fused Triton kernels: one file per kernel family, with its equation, reference, cost and launcher.

Importing this package imports triton, which reads TRITON_INTERPRET then; `hycam_kernels` imports it at the first call
that can use it.
"""
