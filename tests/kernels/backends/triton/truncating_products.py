"""Products in triton's interpreter as NVIDIA's matrix instructions sum them (Fasi et al., 2021), for 16-bit operands.

The instruction adds a few products to the accumulator at once and truncates the sum to float32, where the interpreter
sums a whole block apart from it and rounds to nearest.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from tests.kernels.backends.triton.interpreter_bfloat16 import widen

# of an A100; an H100 adds 16 at once
PRODUCTS = 8


def truncate(values: np.ndarray) -> np.ndarray:
    """float64 to float32, towards 0."""
    nearest = values.astype(np.float32)
    return np.where(np.abs(nearest) > np.abs(values), np.nextafter(nearest, np.float32(0)), nearest)


def create_dot(self, a, b, accumulator, *options) -> TensorHandle:
    """The interpreter's product of two tiles and an accumulator."""
    left, right = ((widen(x.data) if x.dtype.scalar == tl.bfloat16 else x.data).astype(np.float64) for x in (a, b))
    total = accumulator.data
    for start in range(0, left.shape[1], PRODUCTS):
        total = truncate(total + left[:, start : start + PRODUCTS] @ right[start : start + PRODUCTS])
    return TensorHandle(total, accumulator.dtype.scalar)
