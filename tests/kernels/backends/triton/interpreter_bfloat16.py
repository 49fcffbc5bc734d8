"""bfloat16 in triton's interpreter as a GPU computes it.

The interpreter (triton 3.6 and 3.7) keeps bfloat16 as uint16 bit patterns, multiplies the patterns in `tl.dot`, and
truncates float32 to bfloat16 where hardware rounds to nearest even.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bit patterns, to nearest even; every NaN to the quiet one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    round_up = np.uint32(0x7FFF) + ((bits >> 16) & 1)
    return np.where(np.isnan(values), np.uint16(0x7FC0), ((bits + round_up) >> 16).astype(np.uint16))


def repair() -> None:
    """Replace the interpreter's product and casts. Idempotent."""
    builder = InterpreterBuilder
    if hasattr(builder, "plain_create_dot"):
        return
    builder.plain_create_dot, builder.plain_cast_impl = builder.create_dot, builder.cast_impl

    def create_dot(self, a, b, accumulator, *options):
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return self.plain_create_dot(a, b, accumulator, *options)
        a_values, b_values = (widen(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b))
        product = np.matmul(a_values, b_values, dtype=accumulator.data.dtype)
        return TensorHandle(product + accumulator.data, accumulator.dtype.scalar)

    def cast_impl(self, source, target):
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(narrow(source.data), target.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(widen(source.data), target.scalar)
        return self.plain_cast_impl(source, target)

    builder.create_dot = create_dot
    # the interpreter's class binds these names to the plain cast
    for name in ("cast_impl", "create_fp_ext", "create_fp_trunc", "create_si_to_fp", "create_ui_to_fp"):
        setattr(builder, name, cast_impl)
    builder.create_fp_to_si = builder.create_fp_to_ui = cast_impl
    builder.create_int_cast = lambda self, source, target, is_signed: cast_impl(self, source, target)
