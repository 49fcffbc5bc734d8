"""Gumbel noise by Philox 4x32-10, the same stream as `tl.rand` in the fused kernels.

Philox is counter-based (Salmon et al., SC 2011): the draw for token t and expert k is a function of the seed and the
counter ``t * E + k`` alone, so noise is never stored and any backend can replay it.
"""

import sys

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL_KEYS = (0x9E3779B9, 0xBB67AE85)
# triton's factor: the largest float32 for which (2^31 - 1) * factor stays below 1
_UINT31_TO_UNIT = 4.6566127342e-10
# so many draws cost about the same in tensors as in one Python integer
_FEW = 800


def as_seed_tensor(seed: int | Tensor, device: torch.device | None = None) -> Tensor:
    """The seed as a 0-d int64 tensor; an int is taken modulo 2^64, a tensor passes unchanged."""
    if isinstance(seed, Tensor):
        return seed
    return torch.full((), seed - (1 << 64) if seed >= 1 << 63 else seed, dtype=torch.int64, device=device)


def philox_uniform(seed: Tensor, counter: Tensor) -> Tensor:
    """Uniforms in [0, 1), float32, bit-equal to ``tl.rand(seed, counter)`` for counters below 2^32.

    Args:
        seed: 0-d int64.
        counter: int64, any shape.
    """
    steps = torch.arange(_ROUNDS, device=seed.device)
    keys = zip(seed + _WEYL_KEYS[0] * steps, (seed >> 32) + _WEYL_KEYS[1] * steps, strict=True)
    c0 = counter & _WORD
    c1 = c2 = c3 = torch.zeros_like(c0)
    for k0, k1 in keys:
        # The 64 bits of a product of two words, whatever its sign as int64: the low word is that of the product as it
        # is, the high word comes down by the shift. What lies above a word is masked off before it is multiplied.
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0 = (product1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        c2 = (product0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        c1, c3 = product1, product0
    return _unit(c0.to(torch.int32))


def _few_uniforms(seed: int, count: int) -> Tensor:
    """``philox_uniform(seed, arange(count))`` with a lane of 64 bits for each draw in one Python integer: an operation
    on it takes a tenth of a tensor operation's time where the draws are few.

    A product of two words stays in its lane; what a shift brings in from the next lane is masked off.
    """
    ones = int.from_bytes((b"\1" + bytes(7)) * count, "little")
    words = ones * _WORD
    c0 = int.from_bytes(b"".join([draw.to_bytes(8, "little") for draw in range(count)]), "little")
    c1 = c2 = c3 = 0
    for step in range(_ROUNDS):
        k0, k1 = (seed + step * _WEYL_KEYS[0]) & _WORD, ((seed >> 32) + step * _WEYL_KEYS[1]) & _WORD
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c2 = ((product1 >> 32) ^ c1 ^ ones * k0) & words, ((product0 >> 32) ^ c3 ^ ones * k1) & words
        c1, c3 = product1, product0
    lanes = torch.frombuffer(bytearray(c0.to_bytes(8 * count, sys.byteorder)), dtype=torch.int64)
    return _unit((lanes if sys.byteorder == "little" else lanes.flip(0)).to(torch.int32))


def _unit(word: Tensor) -> Tensor:
    """A word, read as a signed 32-bit integer, as a float in [0, 1): its negative half mirrored onto [0, 2^31)."""
    return torch.where(word < 0, ~word, word).to(torch.float32) * _UINT31_TO_UNIT


def gumbel_noise(
    seed: int | Tensor, num_tokens: int, num_experts: int, device: torch.device | str | None = None
) -> Tensor:
    """Gumbel(0, 1) noise ``-log(-log u)`` as `hycam_modulation` draws it for ``seed``.

    Args:
        seed: int or 0-d int64 tensor.
        num_tokens: T; row t belongs to the t-th token of the flattened input.
        num_experts: E.
        device: of the result; by default the seed tensor's device, else torch's default.

    Returns:
        [T, E] float32. The uniforms are bit-equal to those of the kernels, the logarithms equal to float32 rounding.

    Raises:
        TypeError: ``seed`` is neither an int nor an int64 tensor.
        ValueError: ``seed`` is a tensor with dimensions, or out of 64 bits; a negative size.
    """
    check_seed(seed, "gumbel_noise")
    if num_tokens < 0 or num_experts < 0:
        raise ValueError(
            f"gumbel_noise: num_tokens and num_experts must not be negative, got {num_tokens} and {num_experts}"
        )
    seed = as_seed_tensor(seed, torch.device(device) if device is not None else None)
    if device is not None:
        seed = seed.to(device)
    count = num_tokens * num_experts
    if 0 < count <= _FEW and type(seed) is Tensor and seed.device.type == "cpu" and not torch.compiler.is_compiling():
        uniform = _few_uniforms(int(seed), count)
    else:
        uniform = philox_uniform(seed, torch.arange(count, dtype=torch.int64, device=seed.device))
    # 0 is a possible draw; the smallest other draw stands in for it so that the logarithm is finite
    noise = uniform.clamp_min_(_UINT31_TO_UNIT).log_().neg_().log_().neg_()
    return noise.view(num_tokens, num_experts)


def check_seed(seed: object, caller: str) -> None:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"{caller}: seed must be an int or a 0-d int64 tensor, got a {seed.dtype} tensor")
        if seed.ndim != 0:
            raise ValueError(f"{caller}: seed must be an int or a 0-d int64 tensor, got shape {tuple(seed.shape)}")
    elif isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"{caller}: seed must be an int or a 0-d int64 tensor, got {type(seed).__name__}")
    elif not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"{caller}: seed must fit 64 bits, got {seed}")
