"""tanh.approx.f32 at its worst: every value is off by 2^-11 of itself, up or down by a bit of the argument."""

import triton
import triton.language as tl


@triton.jit
def silu_gate(a, SIGMOID: tl.constexpr):
    if SIGMOID == "tanh":
        exact = 2.0 / (1.0 + tl.exp2(a * -2.8853900817779268)) - 1.0
        up = (a.to(tl.int32, bitcast=True) >> 5) & 1
        return tl.clamp(exact * (1.0 + 0.00048828125 * (2 * up - 1).to(tl.float32)), -1.0, 1.0)
    else:
        return 1.0 / (1.0 + tl.exp2(a * -1.4426950408889634))
