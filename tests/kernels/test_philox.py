"""Noise: known answers, distribution, and equality with Triton's own generator."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from hycam_kernels import gumbel_noise, philox
from hycam_kernels.philox import philox_uniform

SEEDS = (0, 42, 1234567890123456789, -7, 2**64 - 1)

TRITON_UNIFORMS = """
import sys, numpy, torch, triton, triton.language as tl

@triton.jit
def uniforms(out, seed, size: tl.constexpr):
    at = tl.program_id(0) * size + tl.arange(0, size)
    tl.store(out + at, tl.rand(tl.load(seed), at))

rows = []
for seed in map(int, sys.argv[2:]):
    out = torch.empty(4096)
    uniforms[(4,)](out, torch.tensor(seed), 1024)
    rows.append(out)
numpy.save(sys.argv[1], torch.stack(rows).numpy())
"""


def signed(seed: int) -> int:
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def test_known_answer():
    # Philox 4x32-10 of counter 0 under key 0 begins with 0x6627e8d5 (Random123's published vectors)
    uniform = philox_uniform(torch.tensor(0), torch.tensor([0]))
    assert uniform.item() == np.float32(0x6627E8D5) * np.float32(4.6566127342e-10)


def test_bit_equal_to_triton(tmp_path):
    pytest.importorskip("triton")
    file = tmp_path / "uniforms.npy"
    script = tmp_path / "uniforms.py"
    script.write_text(TRITON_UNIFORMS)
    command = [sys.executable, str(script), str(file), *(str(signed(seed)) for seed in SEEDS)]
    subprocess.run(command, check=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    counter = torch.arange(4096)
    for seed, want in zip(SEEDS, np.load(file), strict=True):
        assert np.array_equal(philox_uniform(torch.tensor(signed(seed)), counter).numpy(), want), seed


def word(seed: int, counter: int) -> int:
    """The first word of Philox 4x32-10 as Salmon et al. write it, one counter at a time."""
    c0, c1, c2, c3 = counter, 0, 0, 0
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0


def uniform(seed: int, counter: int) -> np.float32:
    signed_word = word(seed, counter)
    folded = 0xFFFFFFFF - signed_word if signed_word >= 1 << 31 else signed_word
    return np.float32(folded) * np.float32(4.6566127342e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_bit_equal_to_the_algorithm_one_draw_at_a_time(seed):
    counters = [*range(40), 799, 800, 801, 2**31 - 1, 2**31, 2**32 - 1]
    want = np.array([uniform(seed, counter) for counter in counters])
    assert np.array_equal(philox_uniform(torch.tensor(signed(seed)), torch.tensor(counters)).numpy(), want)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [1, 2, 5, 400, 799, 800, 801, 1500])
def test_few_draws_are_the_same_bits(seed, count):
    """However many are drawn, and by whichever of the two ways."""
    want = philox_uniform(torch.tensor(signed(seed)), torch.arange(count))
    assert torch.equal(philox._few_uniforms(signed(seed), count), want)
    assert want[-1].item() == uniform(seed, count - 1)
    noise = -torch.log(-torch.log(want.clamp_min(4.6566127342e-10)))
    assert torch.equal(gumbel_noise(seed, count, 1).flatten(), noise)


def test_distribution():
    noise = gumbel_noise(3, 20_000, 5).double()
    assert noise.isfinite().all()
    # mean 0.5772 and variance pi^2 / 6 of Gumbel(0, 1), within five standard errors of 100,000 draws
    assert noise.mean().item() == pytest.approx(0.5772, abs=5 * 1.2825 / 100_000**0.5)
    assert noise.var().item() == pytest.approx(1.6449, abs=0.05)
    correlation = torch.corrcoef(noise.T).fill_diagonal_(0)
    assert correlation.abs().max() < 0.04


def test_zero_draw_stays_finite(monkeypatch):
    monkeypatch.setattr(philox, "philox_uniform", lambda seed, counter: torch.zeros(counter.shape))
    monkeypatch.setattr(philox, "_few_uniforms", lambda seed, count: torch.zeros(count))
    assert gumbel_noise(0, 2, 3).isfinite().all()
    assert gumbel_noise(0, 2000, 3).isfinite().all()


def test_row_belongs_to_token():
    assert torch.equal(gumbel_noise(9, 7, 4), gumbel_noise(9, 30, 4)[:7])


def test_seed_forms_agree():
    assert torch.equal(gumbel_noise(5, 3, 2), gumbel_noise(torch.tensor(5), 3, 2))
    assert torch.equal(gumbel_noise(2**64 - 1, 3, 2), gumbel_noise(-1, 3, 2))
    assert not torch.equal(gumbel_noise(5, 3, 2), gumbel_noise(5 + 2**32, 3, 2))
    assert gumbel_noise(1, 0, 4).shape == (0, 4)


@pytest.mark.parametrize(
    ("seed", "error"),
    [
        (1.5, TypeError),
        (True, TypeError),
        (torch.tensor(1.0), TypeError),
        (torch.tensor([1]), ValueError),
        (2**64, ValueError),
        (-(2**63) - 1, ValueError),
    ],
)
def test_bad_seed(seed, error):
    with pytest.raises(error, match="seed"):
        gumbel_noise(seed, 3, 2)


def test_bad_size():
    with pytest.raises(ValueError, match="num_tokens"):
        gumbel_noise(1, -1, 2)
