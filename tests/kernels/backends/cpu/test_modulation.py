"""The tests of the op again: with the torch backend's own passes, and with native ones for each of the vector sets."""

import pytest
import torch

from hycam_kernels import gumbel_noise, hycam_modulation
from hycam_kernels.backends.cpu import library
from hycam_kernels.backends.cpu import modulation as cpu_backend
from hycam_kernels.backends.cpu import passes as native
from hycam_kernels.preparation import prepare
from tests.kernels.cases import Case, assert_as_good_as_eager, packed, run
from tests.kernels.test_modulation import *  # noqa: F403
from tests.kernels.test_modulation import CASES


@pytest.fixture(params=["0", *library.VECTOR_SETS], autouse=True)
def passes(request, choose) -> str:
    choose(request.param)
    if request.param != "0" and (why := library.refusal()):
        pytest.skip(why)
    return request.param


def test_the_chosen_passes_run(passes, monkeypatch):
    called = []
    for name in ("forward", "backward"):
        real = getattr(cpu_backend, name)
        monkeypatch.setattr(cpu_backend, name, lambda *args, real=real: called.append(real) or real(*args))
    run(hycam_modulation, CASES["paper"].make(torch.float32), backend="torch")
    assert len(called) == (0 if passes == "0" else 2)


@pytest.mark.parametrize("d", [7, 16, 31, 512, 1029])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_widths(d, dtype):
    """A vector's rest, and more than the columns that a pass works on at a time."""
    case = Case((37,), d, biases=True, residual=True, masked=True, options={"seed": 5, "scale": 0.7})
    assert_as_good_as_eager(lambda arguments: run(hycam_modulation, arguments), case, dtype, draws=2 if d > 100 else 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", ["slora", "full"])
def test_several_blocks_of_rows(dtype, experts):
    case = Case((1700,), 24, biases=True, experts=experts, options={"seed": 5})
    # of one draw the five numbers of the router bias tell nothing: eager itself varies threefold
    assert_as_good_as_eager(lambda arguments: run(hycam_modulation, arguments), case, dtype, draws=6)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_streams_of_several_dtypes(dtypes):
    """h_att in one dtype, h_in in another, beside a bfloat16 hidden."""

    def call(arguments):
        for name, dtype in zip(("attn_output", "residual"), dtypes, strict=True):
            arguments[name] = arguments[name].detach().to(dtype).requires_grad_()
        return run(hycam_modulation, arguments)

    case = Case(residual=True, options={"seed": 3})
    got = call(case.make(torch.bfloat16))
    assert [got[f"grad_{name}"].dtype for name in ("attn_output", "residual")] == list(dtypes)
    assert_as_good_as_eager(call, case, torch.bfloat16)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 1e30, -1e30, 100.0, -100.0])
@pytest.mark.parametrize("name", ["hidden", "attn_output", "residual", "shared_bias", "lora_b_bias", "router_bias"])
def test_special_values_come_out_as_from_torch(name, value, choose):
    """But infinite where torch, which blends two infinities, says NaN."""

    def results():
        arguments = Case((5,), 19, biases=True, residual=True, options={"seed": 3}).make(torch.float32)
        arguments[name].data.view(-1)[[0, -1]] = value
        return run(hycam_modulation, arguments)

    got = results()
    choose("0")
    for key, want in results().items():
        finite = want.isfinite()
        assert torch.equal(got[key].isfinite(), finite), key
        assert want[got[key].isnan()].isnan().all(), key
        torch.testing.assert_close(got[key][finite], want[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", ["expanded", "strided", "transposed"])
def test_upstream_gradients_of_any_strides(grad):
    arguments = CASES["released"].make(torch.float32)
    wanted = [value for value in arguments.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    upstream = {
        "expanded": torch.ones(()).expand(2, 13, 24),
        "strided": torch.randn(2, 13, 50)[..., 1:49:2],
        "transposed": torch.randn(24, 13, 2).mT.transpose(0, 2).mT,
    }[grad]
    upstream = upstream if upstream.shape == (2, 13, 24) else upstream.reshape(2, 13, 24)
    before = upstream.clone()
    got, want = (
        torch.autograd.grad(hycam_modulation(**arguments).hidden_states, wanted, given, allow_unused=True)
        for given in (upstream, upstream.contiguous())
    )
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(upstream, before)


def test_backward_twice():
    """A graph that is kept gives the same gradients again."""
    arguments = CASES["paper"].make(torch.bfloat16)
    out = hycam_modulation(**arguments).hidden_states.float().square().sum()
    wanted = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    first, second = (torch.autograd.grad(out, wanted, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("tokens", "inference"), [(2, True), (30, True), (500, False)])
def test_the_op_draws_noise_by_the_native_pass(passes, monkeypatch, tokens, inference):
    """The definition's bits."""
    drawn = []
    draw = native.gumbel_noise
    monkeypatch.setattr(native, "gumbel_noise", lambda *of: drawn.append(draw(*of)) or drawn[-1])
    arguments = Case((tokens,), 16).make(torch.float32) | {"gumbel": None}
    for seed in (0, 42, -7, 1234567890123456789, 2**64 - 1):
        with torch.inference_mode(inference):
            hycam_modulation(**arguments, seed=seed)
        if passes == "0":
            assert not drawn
            continue
        assert torch.equal(drawn.pop(), gumbel_noise(seed, tokens, arguments["router_weight"].shape[0]))


def test_refusals_of_a_call(passes):
    why = cpu_backend.refusal(prepare(**packed(CASES["paper"].make(torch.float64))))
    assert why == "the native passes take float32, bfloat16 and float16, the products are torch.float64"
