#!/usr/bin/env bash
# A LoRA forward pass on a CPU takes twice the memory of the tensors that are alive: glibc can't fill the holes.
#
# Packages: torch==2.13.0 numpy==2.4.6 (all from PyPI); Python 3.11, CPU only; glibc 2.36 (Debian 12).
#
# One would guess: a layer's temporary tensors are freed within the forward pass, the next layer's have the same sizes,
# so malloc puts those where these were, and the process grows by what autograd keeps.
#
# Really: torch asks for aligned memory. glibc's posix_memalign looks for a free chunk larger than what was asked for, so
# that an aligned block lies in it, and gives the rest back as small chunks to its caches, where they don't merge with
# what is freed beside them, and small objects settle in them. A freed tensor's place is then too small, by some bytes,
# for the next tensor of its very size. Every temporary leaves a hole. LoRA has four of a layer's width for each linear
# layer (base, B's output, the scaled one, the sum), of which one at most is kept. Blocks above a size, at most 32 MiB,
# are mapped one by one and leave no holes; MALLOC_MMAP_THRESHOLD_=131072 fixes the size, at the price of page faults.
#
# Source: malloc/malloc.c of glibc, _int_memalign; sourceware.org bug 30723, mended after 2.38 came out. Debian 12,
# Ubuntu 22.04 and container images made of them have older ones; with a later glibc this script is expected to fail.
#
# Why it matters: fine-tuning on a CPU runs out of memory where its tensors would need half of it, and a plan from their
# shapes is far too low, for adapters more than for the layers alone.
#
# Output seen:
#   glibc 2.36
#   plain, default:         tensors  627 MB, heap  699 MB: 1.11
#   plain, fixed threshold: tensors  628 MB, heap  628 MB: 1.00
#   lora, default:          tensors  460 MB, heap 1111 MB: 2.42
#   lora, fixed threshold:  tensors  461 MB, heap  460 MB: 1.00
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES='' PYTHONWARNINGS=ignore
cat > forward.py <<'EOF'
import ctypes
import sys

import torch
from torch import nn


class Linear(nn.Module):
    def __init__(self, inputs, outputs, adapted):
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=False).requires_grad_(not adapted)
        self.a, self.b = (nn.Linear(inputs, 64, bias=False), nn.Linear(64, outputs, bias=False)) if adapted else (0, 0)

    def forward(self, x):
        return self.base(x) + 0.5 * self.b(self.a(x)) if self.a else self.base(x)


class Block(nn.Module):
    def __init__(self, adapted):
        super().__init__()
        self.gate, self.up = Linear(576, 1536, adapted), Linear(576, 1536, adapted)
        self.down = Linear(1536, 576, adapted)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class MallInfo2(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype = MallInfo2


def malloc_bytes():
    """What is in use, and what is taken from the system."""
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd, info.arena + info.hblkhd


torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(*(Block(sys.argv[1] == "lora") for _ in range(20)))
x = torch.randn(4, 192, 576)
torch.empty(2**25, dtype=torch.uint8)  # as after loading a model: from now on blocks up to 32 MiB are on the heap
before = malloc_bytes()
for _ in range(3):
    y = model(x)
    used, heap = (after - start for after, start in zip(malloc_bytes(), before))
    y.sum().backward()
    del y
print(used, heap)
EOF
cat > compare.py <<'EOF'
import os
import platform
import subprocess
import sys

print(*platform.libc_ver())
for model in ("plain", "lora"):
    for name, settings in (("default", {}), ("fixed threshold", {"MALLOC_MMAP_THRESHOLD_": "131072"})):
        ran = subprocess.run([sys.executable, "forward.py", model], env=os.environ | settings, stdout=-1, check=True)
        used, heap = map(int, ran.stdout.split())
        print(f"{f'{model}, {name}:':23} tensors {used / 1e6:4.0f} MB, heap {heap / 1e6:4.0f} MB: {heap / used:.2f}")
        if settings:
            assert heap < 1.05 * used
        elif model == "lora":
            assert heap > 1.6 * used
EOF
venv/bin/python compare.py
