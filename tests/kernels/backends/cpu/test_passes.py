"""The native passes alone: each against its formula in float64, rounding, strides, and any number of threads."""

import pytest
import torch
import torch.nn.functional as F

from hycam_kernels.backends.cpu import passes

DTYPES = list(passes.DTYPES)
SHAPES = [(5, 1, 3), (3, 17, 1), (67, 48, 5), (130, 1050, 2)]

pytestmark = pytest.mark.usefixtures("vectors")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same rows amid NaN."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), float("nan"), dtype=tensor.dtype)
    wide[..., 3 : 3 + tensor.shape[-1]] = tensor
    return wide[..., 3 : 3 + tensor.shape[-1]]


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """To one rounding of its dtype and a few of float32."""
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=eps / 2 + 2e-6, atol=1e-6 * want.abs().max().item() + 1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("has_s", [False, True])
def test_modulate(dtype, shape, affine, has_s):
    tokens, d, count = shape
    s, products, p = draw(tokens, d, dtype=dtype), draw(count, tokens, d, dtype=dtype), draw(tokens, count).softmax(-1)
    attn, residual, grad = (draw(tokens, d, dtype=kind) for kind in (torch.float32, torch.float16, torch.bfloat16))
    shift, scale = (draw(count, d), 1.7) if affine else (None, 1.0)
    out = strided(torch.empty(tokens, d))

    given = [tensor.double().requires_grad_() for tensor in (s, products, p, attn, residual)]
    s64, products64, p64, attn64, residual64 = given
    z = scale * products64 + (0 if shift is None else shift.double()[:, None])
    fusion = (p64.T[..., None] * F.silu(z)).sum(0) + (F.silu(s64) if has_s else 0 * s64)
    want = attn64 + (attn64 + residual64) * fusion
    d_s, d_products, d_p, d_attn, d_residual = torch.autograd.grad(want, given, grad.double())

    streams = strided(attn), strided(residual)
    passes.modulate(strided(s) if has_s else None, strided(products), p, shift, scale, *streams, out)
    close(out, want.detach())

    got_s, got_attn, got_residual = strided(torch.empty_like(s)), torch.empty_like(attn), torch.empty_like(residual)
    got_p, got_products = torch.empty_like(p), strided(products.clone())
    passes.modulate_backward(
        strided(s) if has_s else None, got_products, p, shift, scale, strided(grad), *streams,
        got_s if has_s else None, got_p, got_attn, got_residual,
    )  # fmt: skip
    for got, expected in zip(
        (got_products, got_p, got_attn, got_residual, got_s if has_s else None),
        (d_products, d_p, d_attn, d_residual, d_s),
        strict=True,
    ):
        if got is not None:
            close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_route(dtype, shape, masked, hard, given):
    tokens, d, count = shape
    hidden, weight, bias, noise = (
        draw(tokens, d, dtype=dtype),
        draw(count, d) * d**-0.5,
        draw(count),
        draw(tokens, count),
    )
    mask = torch.rand(tokens) > 0.4 if masked else None
    logits64 = (hidden.double() @ weight.double().T + bias.double()).requires_grad_()
    given_logits = logits64.detach().float() if given else None
    logits, p, used, load, router_prob = passes.route(
        strided(hidden), None if given else weight, None if given else bias, given_logits, noise, 0.3, mask, hard
    )
    p64 = torch.softmax((logits64 + noise.double()) / 0.3, -1)
    close(logits, logits64.detach())
    torch.testing.assert_close(p.double(), p64.detach(), rtol=1e-4, atol=1e-5)
    used64 = F.one_hot(p64.argmax(-1), count).double() + p64 - p64.detach() if hard else p64
    rows = torch.ones(tokens, dtype=torch.bool) if mask is None else mask
    load64, router64 = (values[rows].sum(0) / max(rows.sum(), 1) for values in (used64, logits64.softmax(-1)))
    torch.testing.assert_close(used.double(), used64.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(load.double(), load64.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(router_prob.double(), router64.detach(), rtol=1e-5, atol=1e-6)

    d_p, grad_load, grad_router = draw(tokens, count), draw(count), draw(count)
    scalar = (p64 * d_p.double()).sum() + load64 @ grad_load.double() + router64 @ grad_router.double()
    (want,) = torch.autograd.grad(scalar, logits64)
    narrow = strided(torch.empty(tokens, count, dtype=dtype))
    got = passes.route_backward(p, logits, d_p, grad_load, grad_router, 0.3, mask, narrow)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)
    assert torch.equal(narrow, got.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_sum_tokens(dtype, shape, masked):
    tokens, d, count = shape
    values, weight = draw(tokens, d, dtype=dtype), draw(tokens, count)
    mask = torch.rand(tokens) > 0.4 if masked else None
    rows = torch.ones(tokens, dtype=torch.bool) if mask is None else mask
    values[~rows] = float("nan")
    close(passes.sum_tokens(strided(values), weight, mask), weight.double()[rows].T @ values.double()[rows])
    before = draw(1, d)
    want = before.double() + values.double()[rows].sum(0, keepdim=True)
    close(passes.sum_tokens(values, None, mask, before), want)


def bits(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)


def through(attn: torch.Tensor) -> torch.Tensor:
    """h_out of a call without any term: h_att."""
    out = torch.empty_like(attn)
    passes.modulate(None, attn.new_empty(0, *attn.shape), torch.empty(len(attn), 0), None, 1.0, attn, None, out)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_is_read_and_written(dtype):
    values = bits(dtype)
    got, finite = through(values), values.isfinite()
    assert torch.equal(got[finite], values[finite])
    assert got[~finite].isnan().all()  # an infinite h_att times 0


def test_denormals_are_numbers():
    values = torch.tensor([[1e-40, -3e-44, 1.4e-45]])
    assert torch.equal(through(values), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_as_torch_does(dtype):
    """Ties, NaN of any bits, overflow: d_S at S = 0 is half of grad * h_att."""
    wide = bits(dtype).float().view(torch.int32)
    offsets = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0x1000, 0x0FFF, 0x1001], dtype=torch.int32)
    grad = (wide[None] + offsets[:, None, None]).view(torch.float32).view(-1, 1024)
    zeros, d_s = torch.zeros(grad.shape, dtype=dtype), torch.empty(grad.shape, dtype=dtype)
    passes.modulate_backward(
        zeros, zeros.new_empty(0, *grad.shape), torch.empty(len(grad), 0), None, 1.0, grad, torch.ones_like(grad), None,
        d_s, torch.empty(len(grad), 0), None, None,
    )  # fmt: skip
    want = (grad * 0.5).to(dtype)
    assert torch.equal(d_s.isnan(), want.isnan())
    assert torch.equal(d_s[~want.isnan()], want[~want.isnan()])


def results_of_every_pass() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens, d, count = 777, 301, 5

    def draw(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, generator=generator).to(dtype)

    hidden, s, products, grad = draw(tokens, d), draw(tokens, d), draw(count, tokens, d), draw(tokens, d)
    mask = torch.rand(tokens, generator=generator) > 0.3
    noise = passes.gumbel_noise(11, tokens, count)
    routed = passes.route(hidden, draw(count, d, dtype=torch.float32), None, None, noise, 0.5, mask, True)
    logits, p = routed[:2]
    out, d_s, d_attn, d_p = torch.empty_like(s), torch.empty_like(s), torch.empty_like(s), torch.empty_like(p)
    passes.modulate(s, products, p, None, 1.5, hidden, grad, out)
    passes.modulate_backward(s, products, p, None, 1.5, grad, hidden, s, d_s, d_p, d_attn, None)
    d_logits = passes.route_backward(p, logits, d_p, p[0].clone(), p[1].clone(), 0.5, mask, None)
    return [noise, *routed, out, d_s, d_attn, d_p, products, d_logits, passes.sum_tokens(hidden, d_logits, mask)]


def test_the_same_bits_on_any_number_of_threads():
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            found.append(results_of_every_pass())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)
