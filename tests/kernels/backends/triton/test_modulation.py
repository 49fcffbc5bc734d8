"""The op on the fused kernels: values and gradients against float64, memory, and its place in autograd and compile."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from hycam_kernels import gumbel_noise, hycam_modulation
from hycam_kernels.backends.torch import modulation as torch_backend
from hycam_kernels.backends.triton import modulation as triton_backend
from hycam_kernels.preparation import prepare
from hycam_kernels.reference import modulation_reference
from tests.kernels.backends.triton.conftest import INTERPRETING
from tests.kernels.backends.triton.fused import CASES, assert_touches_only_its_own_memory, run_fused
from tests.kernels.cases import Case, assert_as_good_as_eager, errors, kept_bytes, leaves, packed, run

primitives = pytest.importorskip("hycam_kernels.backends.triton.kernels.primitives")
from hycam_kernels.backends.triton.kernels import fusion_backward_kernels, fusion_forward
from tests.kernels.backends.triton import approximate_tanh

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# every case in bfloat16, some in float16 and float32 (in float32 all are compared with the torch backend below)
COVERING = [(name, torch.bfloat16) for name in CASES] + [
    (name, dtype)
    for dtype in (torch.float16, torch.float32)
    for name in ("one-token", "many-experts", "rank-over-a-block", "released", "shared-only")
]


@pytest.mark.parametrize(("name", "dtype"), COVERING)
def test_is_as_good_as_eager(name, dtype, device):
    assert_as_good_as_eager(lambda arguments: run_fused(arguments, device), CASES[name], dtype, draws=2)


@pytest.mark.parametrize("name", ["released", "rank-64", "sixteen-experts"])
def test_the_worst_of_a_gpu_s_tanh_leaves_a_margin(name, device, monkeypatch):
    """tanh.approx, which the interpreter hasn't, is off by 2^-11 of its result at most."""
    if INTERPRETING:
        for module in (fusion_forward, fusion_backward_kernels, primitives):
            monkeypatch.setattr(module, "silu_gate", approximate_tanh.silu_gate)
    case = dataclasses.replace(CASES[name], leading=(32,))
    assert_as_good_as_eager(lambda arguments: run_fused(arguments, device), case, torch.bfloat16, draws=2, times=1.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "d", "num_experts", "rank"), list(itertools.product((1, 77, 130), (80, 96, 200), (1, 3, 8), (4, 16, 64)))
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_ragged_shape_is_as_good_as_eager(tokens, d, num_experts, rank, dtype, device):
    case = Case((tokens,), d, num_experts, rank, masked=True, options={"seed": 3})
    assert_as_good_as_eager(lambda arguments: run_fused(arguments, device), case, dtype, draws=2)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_torch_backend(name, device):
    arguments = CASES[name].make(torch.float32)
    want = run(hycam_modulation, arguments, backend="torch")
    for result, (whole, row) in errors(run_fused(arguments, device), want).items():
        assert whole < 5e-5, (result, whole)
        assert row < 2e-4, (result, row)


@pytest.mark.parametrize("name", ["paper", "released", "projected", "shared-only", "experts-only"])
def test_recomputation_changes_no_bit(name, device):
    arguments = dataclasses.replace(CASES[name], leading=(33,)).make(torch.bfloat16)
    want = run_fused(arguments, device)
    for result, value in run_fused(arguments, device, recompute=True).items():
        assert torch.equal(value, want[result]), result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["paper", "many-experts", "rank-over-a-block", "released", "projected", "shared-only"])
def test_touches_no_memory_but_its_own(name, dtype, device):
    assert_touches_only_its_own_memory(dataclasses.replace(CASES[name], leading=(70,)), dtype, device)


@pytest.mark.parametrize("name", ["paper", "released", "projected", "shared-only"])
def test_bit_equal_from_run_to_run(name, device):
    arguments = CASES[name].make(torch.bfloat16)
    first = run_fused(arguments, device)
    for result, value in run_fused(arguments, device).items():
        assert torch.equal(value, first[result]), result


@pytest.mark.parametrize("name", CASES)
def test_no_tokens(name, device):
    case = dataclasses.replace(CASES[name], leading=(0, 3))
    arguments = case.make(torch.bfloat16)
    got = run_fused(arguments, device)
    assert got["hidden_states"].shape == (0, 3, case.d)
    for result in ("load", "router_prob", "balance_loss"):
        assert not got[result].any(), result
    for leaf_name, leaf in leaves(arguments).items():
        assert torch.equal(got[f"grad_{leaf_name}"], torch.zeros_like(leaf)), leaf_name


def test_mask_that_counts_no_token(device):
    arguments = CASES["masked"].make(torch.float32)
    arguments["token_mask"] = torch.zeros_like(arguments["token_mask"])
    got = run_fused(arguments, device)
    assert not got["load"].any()
    assert not got["router_prob"].any()
    assert all(value.isfinite().all() for value in got.values())


@pytest.mark.parametrize("decodes", [False, True])
def test_hard_routing_does_not_hide_nan(decodes, device):
    """A token whose p is NaN is NaN in h_out and the load, unless the mask leaves it out of the load."""
    arguments = Case((5,), 80, 3, 4, options={"hard": True, "gumbel": torch.zeros(5, 3)}).make(torch.float32)
    arguments["gumbel"][2] = float("nan")
    arguments = {k: v.detach().to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    arguments["shared_weight"].requires_grad_(not decodes)
    others = torch.arange(5, device=device) != 2
    for token_mask in (None, others):
        got = hycam_modulation(**arguments | {"token_mask": token_mask}, backend="triton")
        assert got.hidden_states[2].isnan().all()
        assert got.hidden_states[others].isfinite().all()
        assert got.load.isnan().all() == (token_mask is None)
        assert got.load.isfinite().all() == (token_mask is not None)
        assert got.router_prob.isfinite().all()


@pytest.mark.parametrize("hard", [False, True])
def test_balance_loss_alone(hard, device):
    """The output is unused: its gradient is absent, and only the router and h get one."""

    def balance(function, **options) -> list[Tensor]:
        arguments = Case((130,), 80, 5, 16, masked=True, options={"seed": 3, "hard": hard}).make(torch.float32)
        arguments = {k: v.detach().to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        wanted = [arguments[name].requires_grad_() for name in ("hidden", "router_weight", "lora_b", "shared_weight")]
        loss = function(**arguments, **options).balance_loss
        return [
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(wanted, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True)
        ]

    for got, want in zip(balance(hycam_modulation, backend="triton"), balance(modulation_reference), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_balance_gradient_survives_float16(device):
    """A token's share of it is below float16's smallest number."""
    arguments = Case((4096,), 8, 3, 2).make(torch.float16, torch.float32)
    arguments = {k: v.detach().to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    weight = arguments["router_weight"].requires_grad_()
    (got,) = torch.autograd.grad(hycam_modulation(**arguments, backend="triton").balance_loss / 320, weight)
    (want,) = torch.autograd.grad(modulation_reference(**arguments).balance_loss / 320, weight)
    torch.testing.assert_close(got, want, rtol=0.01, atol=0.01 * want.abs().max().item())


@pytest.mark.parametrize("hard", [False, True])
def test_a_token_that_does_not_count_may_be_nan(hard, device):
    """Load, balance loss and their gradients are those of the other tokens."""
    case = Case((130,), 80, 3, 16, masked=True, options={"seed": 3, "hard": hard})

    def results(spoilt: bool) -> list[Tensor]:
        arguments = case.make(torch.float32)
        arguments = {k: v.detach().to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        if spoilt:
            arguments["hidden"][~arguments["token_mask"]] = float("nan")
        wanted = [arguments[name].requires_grad_() for name in ("hidden", "router_weight", "lora_a", "shared_weight")]
        out = hycam_modulation(**arguments, backend="triton")
        return [
            *out[1:],
            *torch.autograd.grad(out.balance_loss + (out.load * torch.arange(3, device=device)).sum(), wanted),
        ]

    for got, want in zip(results(spoilt=True), results(spoilt=False), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("skipped", ["hidden", "attn_output", "residual", "shared_weight", "lora_a", "lora_b"])
def test_gradients_do_not_depend_on_which_are_asked_for(skipped, device):
    case = dataclasses.replace(CASES["released"], leading=(9,))
    whole = run_fused(case.make(torch.float32), device)
    arguments = case.make(torch.float32)
    arguments[skipped].requires_grad_(False)
    for name, value in run_fused(arguments, device).items():
        assert torch.equal(value, whole[name]), name


def test_only_the_router_and_the_input_are_trained(device):
    arguments = CASES["masked"].make(torch.float32)
    whole = run_fused(arguments, device)
    for name in set(leaves(arguments)) - {"hidden", "router_weight"}:
        arguments[name].requires_grad_(False)
    for name, value in run_fused(arguments, device).items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("seed", [0, 5, -7, (1 << 63) + 11, torch.tensor(1 << 40)])
def test_noise_is_gumbel_noise(seed, device):
    arguments = Case((3, 13), 80, 5, 4).make(torch.float32)
    noise = gumbel_noise(seed, 39, 5).view(3, 13, 5)
    torch.testing.assert_close(
        run_fused(arguments | {"seed": seed}, device), run_fused(arguments | {"gumbel": noise}, device)
    )
    noise_by_column = noise.movedim(-1, 0).contiguous().movedim(0, -1)
    assert torch.equal(
        run_fused(arguments | {"gumbel": noise_by_column}, device)["load"],
        run_fused(arguments | {"gumbel": noise}, device)["load"],
    )


def test_a_device_seed_is_not_read_on_the_host(device, monkeypatch):
    arguments = CASES["paper"].make(torch.float32)
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    x = prepare(**arguments | {"seed": torch.tensor(3, device=device)}, backend="triton")
    want = triton_backend.forward(x)
    for name in ("item", "__int__", "__bool__", "__index__", "tolist"):
        monkeypatch.setattr(Tensor, name, None)
    got = triton_backend.forward(x)
    monkeypatch.undo()
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_weights_and_stream_of_other_dtypes(weight_dtype, device):
    """fp32 adapters on a bf16 backbone: products in bf16, gradients in the dtype of their tensor."""
    case = Case((33,), 80, 3, 16, biases=True, options={"seed": 3})

    def function(arguments):
        return run_fused(arguments | {"attn_output": attn}, device)

    arguments = case.make(torch.bfloat16, weight_dtype)
    attn = arguments["attn_output"].detach().float().requires_grad_()
    got = function(arguments)
    assert got["hidden_states"].dtype == torch.float32
    for name, leaf in leaves(arguments | {"attn_output": attn}).items():
        assert got[f"grad_{name}"].dtype == leaf.dtype, name
    assert_as_good_as_eager(lambda arguments: run_fused(arguments, device), case, torch.bfloat16, weight_dtype, draws=2)


def test_autocast(device):
    arguments = Case((33,), 80, 3, 16, options={"seed": 3}).make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast(device.type, torch.bfloat16):
        got = run_fused(arguments, device)
        want = run(hycam_modulation, arguments, backend="torch")
    assert got["hidden_states"].dtype == torch.float32
    plain = run_fused(arguments, device)
    for name, (whole, _) in errors(got, want).items():
        assert whole < 1e-2, (name, whole)
    assert not torch.equal(got["hidden_states"], plain["hidden_states"])


def test_strided_and_broadcast_rows(device):
    case = Case((4, 6), 80, 3, 16, residual=True, options={"seed": 3})
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.make(torch.float32).items()}
    strided = dict(arguments)
    for name in ("hidden", "attn_output", "residual"):
        wide = torch.full((4, 6, 3 * case.d), float("nan"), device=device)
        wide[..., case.d : 2 * case.d] = arguments[name].detach()
        strided[name] = wide[..., case.d : 2 * case.d]
        assert prepare(**arguments | {name: strided[name]}).hidden.data_ptr()
    for name in ("lora_b", "router_weight"):
        strided[name] = arguments[name].detach().mT.contiguous().mT
    want = hycam_modulation(**arguments, backend="triton")
    got = hycam_modulation(**strided, backend="triton")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    one_row = {name: arguments[name].detach()[:1, :1].expand(4, 6, -1) for name in ("hidden", "attn_output")}
    got = hycam_modulation(**arguments | one_row, backend="triton")
    want = hycam_modulation(**arguments | {k: v.contiguous() for k, v in one_row.items()}, backend="triton")
    torch.testing.assert_close(got, want)


def test_broadcast_upstream_gradient(device):
    """The gradient of a sum arrives with strides 0."""
    arguments = Case((13,), 80, 3, 16).make(torch.float32)
    names = leaves(arguments)

    def grads(backend, reduce):
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        return torch.autograd.grad(reduce(hycam_modulation(**moved, backend=backend)[0]), list(names.values()))

    for got, want in zip(grads("triton", torch.sum), grads("torch", torch.sum), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_kept_for_backward(recompute, device):
    """At most 1 + E r / d + 0.02 activations beyond h and h_att; at most 0.1 when S and V are made again.

    p and the logits, in float32, are the rest.
    """
    T, d, E, r = 64, 1024, 5, 16
    case = Case((T,), d, E, r, options={"seed": 3})
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.make(torch.bfloat16).items()}
    kept = kept_bytes(hycam_modulation, arguments, recompute=recompute, backend="triton")
    assert kept
    assert kept / (T * d * 2) <= (0.1 if recompute else 1 + E * r / d + 0.02)


@pytest.mark.parametrize("name", ["paper", "released", "projected", "shared-only", "no-branch"])
@pytest.mark.parametrize("keep", [False, True])
def test_opcheck(name, keep, device):
    case = dataclasses.replace(CASES[name], leading=(5,))
    arguments = {k: v.detach().to(device) if isinstance(v, Tensor) else v for k, v in case.make(torch.float32).items()}
    for value in arguments.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_()
    torch.library.opcheck(
        torch.ops.hycam.modulation.default, tuple(prepare(**packed(arguments), recompute=not keep, backend="triton"))
    )


def test_compiles_into_one_graph(device):
    arguments = Case((5,), 80, 3, 4, masked=True).make(torch.float32)

    def function(seed, **arguments):
        return hycam_modulation(**arguments, seed=seed, backend="triton")

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    arguments = {k: v.detach().to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    arguments["lora_b"].requires_grad_()
    for seed in (3, torch.tensor(5, device=device)):
        got, want = compiled(seed, **arguments), function(seed, **arguments)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        grads = (torch.autograd.grad(output[0].square().sum(), arguments["lora_b"]) for output in (got, want))
        torch.testing.assert_close(*grads)


def test_forward_shares_the_torch_backends_contract(device):
    """Same shapes and dtypes of what is kept, so that the fake kernels describe both."""
    for name, case in CASES.items():
        arguments = case.make(torch.bfloat16)
        arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        for recompute in (False, True):
            x = prepare(**packed(arguments), recompute=recompute, backend="triton")
            saved = [backend.forward(x)[3] for backend in (triton_backend, torch_backend)]
            for a, b in zip(*saved, strict=True):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), (name, recompute)
