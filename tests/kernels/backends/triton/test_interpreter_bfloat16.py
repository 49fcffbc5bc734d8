"""The repair of the interpreter's bfloat16: casts bit-equal to torch's, products of values."""

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.backends.triton import interpreter_bfloat16
from tests.kernels.backends.triton.conftest import INTERPRETING


def test_casts_are_bit_equal_to_torch():
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    every = bits.view(torch.bfloat16)
    widened = torch.from_numpy(interpreter_bfloat16.widen(bits.view(torch.uint16).numpy()))
    assert torch.equal(widened.view(torch.int32), every.float().view(torch.int32))
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    patterns = (torch.arange(1 << 16, dtype=torch.int32)[:, None] << 16) | low
    values = patterns.flatten().view(torch.float32)
    narrowed = torch.from_numpy(interpreter_bfloat16.narrow(values.numpy())).view(torch.bfloat16)
    finite = ~values.isnan()
    assert torch.equal(narrowed[finite], values[finite].to(torch.bfloat16))
    assert narrowed[~finite].isnan().all()


@triton.jit
def product_kernel(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)).to(out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_of_values(dtype, device):
    a, b = (torch.randn(16, 16).to(dtype).to(device) for _ in range(2))
    out = torch.empty_like(a)
    product_kernel[(1,)](a, b, out, 16)
    want = (a.double() @ b.double()).to(dtype)
    torch.testing.assert_close(out, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-2 if not INTERPRETING else 1e-6)
