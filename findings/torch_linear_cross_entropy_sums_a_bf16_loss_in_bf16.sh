#!/usr/bin/env bash
# linear_cross_entropy in chunks adds a bf16 loss up in bf16: what it returns is percents off, or half is missing.
#
# Packages: torch==2.13.0 numpy==2.4.6 (all from PyPI); Python 3.11, CPU only.
#
# One would guess: torch.nn.functional.linear_cross_entropy with LinearCrossEntropyOptions() makes the loss without ever
# holding all logits, and for bf16 inputs accumulates in float32 (acc_dtype resolves to float32 on a CPU and on recent
# GPUs), so the loss is the unchunked one up to the rounding of a bf16 result, well under a percent.
#
# Really: gradients and intermediates are accumulated in float32, but the scalar that "mean" and "sum" return is a bf16
# buffer to which every chunk adds its share (of float16 inputs it is float32). bf16 has 8 bits, so once the sum is large
# against a chunk's share, shares round away. With the default chunks the loss is 2 to 3 percent off from a thousand rows
# on; with 16 rows a chunk half of it is missing at 8,192 rows. The gradient is right, and so are the losses of
# reduction="none".
#
# Source: torch/nn/modules/linear_cross_entropy.py of 2.13.0, where the output's dtype is chosen: acc_dtype for float16
# alone, else the input's.
#
# Why it matters: the op is made for training language models in bf16, whose loss is what is logged, compared between
# runs and turned into a perplexity. Training itself goes on as it should, so nothing else tells. Take reduction="none"
# and average in float32.
#
# Output seen:
#   bfloat16,   64 rows: unchunked -0.30 %, default chunks +0.10 %, 16 rows a chunk +0.10 %; gradients differ by 0.002
#   bfloat16, 1024 rows: unchunked +0.46 %, default chunks +2.87 %, 16 rows a chunk +2.87 %; gradients differ by 0.002
#   bfloat16, 8192 rows: unchunked +0.64 %, default chunks +2.25 %, 16 rows a chunk -48.68 %; gradients differ by 0.002
#   float16, 4096 rows: unchunked +0.05 %, default chunks +0.00 %, 16 rows a chunk +0.00 %; gradients differ by 0.001
#   bfloat16, 8192 rows, reduction="none", averaged in float32: +0.00 %
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES='' PYTHONWARNINGS=ignore
venv/bin/python - <<'EOF'
import torch
import torch.nn.functional as F
from torch.nn import LinearCrossEntropyOptions as Options

WIDTH, WORDS = 32, 2048
DEFAULT, SMALL = Options(), Options(batch_chunk_size=16, chunking_method=None)


def made(rows, dtype):
    """Hidden states, a head, targets, and the loss and its gradient in float64."""
    generator = torch.Generator().manual_seed(0)
    head = (0.1 * torch.randn(WORDS, WIDTH, generator=generator)).to(dtype)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(WORDS, (rows,), generator=generator)
    exact = hidden.detach().double().requires_grad_()
    loss = F.cross_entropy(exact @ head.double().T, target)
    loss.backward()
    return hidden, head, target, loss.item(), exact.grad


def off(rows, dtype, options):
    """How far the mean loss is from float64's, and its gradient, both relative."""
    hidden, head, target, loss, grad = made(rows, dtype)
    found = F.linear_cross_entropy(hidden, head, target, options=options)
    found.backward()
    return found.item() / loss - 1, ((hidden.grad.double() - grad).norm() / grad.norm()).item()


for rows, dtype in ((64, torch.bfloat16), (1024, torch.bfloat16), (8192, torch.bfloat16), (4096, torch.float16)):
    (whole, _), (default, first), (small, second) = (off(rows, dtype, options) for options in (None, DEFAULT, SMALL))
    name = str(dtype).removeprefix("torch.")
    losses = f"unchunked {whole:+.2%}, default chunks {default:+.2%}, 16 rows a chunk {small:+.2%}".replace("%", " %")
    print(f"{name}, {rows:4} rows: {losses}; gradients differ by {max(first, second):.3f}")
    assert abs(whole) < 0.01 and max(first, second) < 0.01
    if dtype == torch.float16:
        assert max(abs(default), abs(small)) < 0.001
    elif rows == 8192:
        assert abs(default) > 0.01 and small < -0.3

hidden, head, target, loss, _ = made(8192, torch.bfloat16)
each = F.linear_cross_entropy(hidden, head, target, options=DEFAULT, reduction="none")
mean = each.float().mean().item() / loss - 1
print(f'bfloat16, 8192 rows, reduction="none", averaged in float32: {mean:+.2%}'.replace("%", " %"))
assert abs(mean) < 0.001
EOF
