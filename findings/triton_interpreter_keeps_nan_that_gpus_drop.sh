#!/usr/bin/env bash
# tl.maximum(x, 0) and tl.clamp keep a NaN in triton's interpreter and turn it into a number on a GPU.
#
# Packages: torch==2.13.0 triton==3.7.1 numpy==2.4.6 (all from PyPI); Python 3.11, CPU only.
#
# One would guess: TRITON_INTERPRET=1 follows the documented default of tl.maximum, tl.minimum and tl.clamp,
# PropagateNan.NONE: of NaN and a number the number. At the least propagate_nan=NONE and ALL differ.
#
# Really: the interpreter calls numpy.maximum, minimum and clip for both settings, which return NaN. The compiled
# kernel, made here for sm_80 without a GPU, has max.f32 by default, which PTX defines to return the number, and
# max.NaN.f32 with propagate_nan=ALL. The interpreter's reductions go the other way: tl.max drops NaN as the GPU does.
#
# Why it matters: a test on the CPU that plants a NaN and sees it come out of a ReLU, a clamped softmax or a clipped
# ratio passes, while on the GPU the same kernel hides the NaN as 0 or as the bound: the loss looks fine and the guard
# against NaN never fires. Pass propagate_nan=tl.PropagateNan.ALL where it matters.
#
# Output seen:
#   interpreted: maximum [0.0, nan, 0.5, 2.0] clamp [0.0, nan, 0.5, 1.0] tl.max 2.0
#   compiled for sm_80: {'maximum': ['max.f32'], 'clamp': ['max.f32', 'min.f32'], 'maximum_all': ['max.NaN.f32']}
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 triton==3.7.1 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 HF_HOME="$tmp/hf" TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore TRITON_CACHE_DIR="$tmp/triton"
cat > probe.py <<'EOF'
import os
import re
import subprocess
import sys

import torch
import triton
import triton.language as tl

ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def kernel(x, out):
    row = tl.arange(0, 4)
    value = tl.load(x + row)
    tl.store(out + row, tl.maximum(value, 0.0))
    tl.store(out + 4 + row, tl.clamp(value, 0.0, 1.0))
    tl.store(out + 8 + row, tl.maximum(value, 0.0, propagate_nan=ALL))
    tl.store(out + 12, tl.max(value, 0))


def interpret():
    x = torch.tensor([-1.0, float("nan"), 0.5, 2.0])
    out = torch.empty(13)
    kernel[(1,)](x, out)
    print("interpreted: maximum", out[:4].tolist(), "clamp", out[4:8].tolist(), "tl.max", out[12].item())
    assert out[1].isnan() and out[5].isnan() and out[9].isnan() and out[12] == 2.0


def instructions(body):
    from triton.backends.compiler import GPUTarget

    source = triton.compiler.ASTSource(fn=body, signature={"x": "*fp32", "out": "*fp32"}, constexprs={})
    ptx = triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]
    return sorted(set(re.findall(r"\b(?:max|min)\.[\w.]*f32", ptx)))


@triton.jit
def maximum(x, out):
    row = tl.arange(0, 4)
    tl.store(out + row, tl.maximum(tl.load(x + row), 0.0))


@triton.jit
def clamp(x, out):
    row = tl.arange(0, 4)
    tl.store(out + row, tl.clamp(tl.load(x + row), 0.0, 1.0))


@triton.jit
def maximum_all(x, out):
    row = tl.arange(0, 4)
    tl.store(out + row, tl.maximum(tl.load(x + row), 0.0, propagate_nan=ALL))


if os.environ.get("TRITON_INTERPRET") == "1":
    interpret()
    sys.exit()
subprocess.run([sys.executable, __file__], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)
compiled = {body.__name__: instructions(body) for body in (maximum, clamp, maximum_all)}
print("compiled for sm_80:", compiled)
assert compiled["maximum"] == ["max.f32"]
assert compiled["clamp"] == ["max.f32", "min.f32"]
assert compiled["maximum_all"] == ["max.NaN.f32"]
EOF
venv/bin/python probe.py
