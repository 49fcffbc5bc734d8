"""The op on the torch backend: values, gradients, dtypes, memory, and its place in autograd and torch.compile."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hycam_kernels import explain_backend, gumbel_noise, hycam_modulation
from hycam_kernels.backends.torch import modulation as torch_backend
from hycam_kernels.inputs import DIFFERENTIABLE
from hycam_kernels.preparation import prepare
from hycam_kernels.reference import modulation_reference
from tests.kernels.cases import (
    Case,
    assert_as_good_as_eager,
    errors,
    kept_bytes,
    leaves,
    packed,
    reference_results,
    run,
)

CASES = {
    "paper": Case(options={"seed": 3}),
    "evaluation": Case(),
    "one-token": Case(leading=(1,), options={"seed": 3}),
    "no-leading-dimension": Case(leading=(), options={"seed": 3}),
    "many-leading-dimensions": Case(leading=(2, 1, 3, 2)),
    "masked": Case(masked=True, options={"seed": 3}),
    "hard": Case(masked=True, options={"seed": 3, "hard": True}),
    "tau": Case(options={"tau": 2.5, "seed": 3}),
    "one-expert": Case(num_experts=1, rank=1, options={"seed": 3}),
    "many-experts": Case(num_experts=8, rank=5, options={"seed": 3}),
    "experts-only": Case(shared=False, biases=True, options={"seed": 3}),
    "shared-only": Case(experts=None, biases=True),
    "no-branch": Case(shared=False, experts=None),
    "full-rank": Case(experts="full", masked=True, options={"seed": 3}),
    "full-rank-only": Case(experts="full", shared=False, biases=True, options={"scale": 2.0}),
    "projected": Case(experts="projected", biases=True, masked=True, options={"seed": 3}),
    "projected-only": Case(experts="projected", shared=False, residual=True, options={"scale": 2.0}),
    "released": Case(biases=True, residual=True, options={"seed": 3, "hard": True, "scale": 8.0}),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request) -> Case:
    return request.param


def test_a_gradient_that_nobody_needs_is_as_the_fake_has_it():
    """Empty, and of hidden's dtype: torch.compile takes the fake's word for it."""
    x = prepare(**packed(Case().make(torch.bfloat16)), backend="torch")
    out, load, router_prob, *saved = torch.ops.hycam.modulation(*x)
    needs = [False] * len(DIFFERENTIABLE)

    def backward(out: Tensor) -> list[Tensor]:
        return torch.ops.hycam.modulation_backward(out, load, router_prob, *x, *saved, needs)

    got = backward(out)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = backward(mode.from_tensor(out))
    assert [(a.shape, a.dtype, a.device) for a in got] == [(b.shape, b.dtype, b.device) for b in fakes]


@pytest.mark.parametrize("recompute", [False, True])
def test_equals_reference_in_float64(case, recompute):
    arguments = case.make(torch.float64)
    got = run(hycam_modulation, arguments, recompute=recompute, backend="torch")
    for name, (whole, row) in errors(got, reference_results(arguments, torch.float64)).items():
        assert whole < 1e-12, (name, whole)
        assert row < 1e-11, (name, row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_eager(case, dtype):
    assert_as_good_as_eager(lambda arguments: run(hycam_modulation, arguments, backend="torch"), case, dtype)


def test_gradcheck():
    case = Case((2, 3), 5, 2, 3, biases=True, residual=True, masked=True, options={"seed": 1, "scale": 1.7})
    arguments = case.make(torch.float64)
    names = list(leaves(arguments))

    def function(*tensors):
        return tuple(hycam_modulation(**arguments | dict(zip(names, tensors, strict=True)), backend="torch"))

    assert torch.autograd.gradcheck(function, tuple(leaves(arguments).values()))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_projections_stand_for_their_products(backend):
    """Values and gradients of the call that makes V and the logits itself, whatever the strides."""
    arguments = Case((2, 7), residual=True, masked=True, options={"seed": 3}).make(torch.float64)
    want = run(hycam_modulation, arguments)

    def function(lora_a, lora_n, router_weight, **rest):
        v = torch.einsum("...d,erd->...er", rest["hidden"], lora_n @ lora_a)
        logits = (rest["hidden"] @ router_weight.T).mT.contiguous().mT
        return hycam_modulation(
            **rest, lora_a=None, lora_n=None, router_weight=None, projections=(v, logits), backend=backend
        )

    for name, (whole, row) in errors(run(function, arguments), want).items():
        assert whole < 1e-12, (name, whole)
        assert row < 1e-11, (name, row)


def test_projections_of_other_dtypes():
    """Cast to the compute dtype and to float32; gradients in the dtypes that were given."""
    arguments = Case(experts="projected").make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(hycam_modulation, arguments | {"v": arguments["v"].detach().double().requires_grad_()})
        want = run(hycam_modulation, arguments | {"v": arguments["v"].detach().bfloat16().requires_grad_()})
    assert torch.equal(got["hidden_states"], want["hidden_states"])
    assert (got["grad_v"].dtype, want["grad_v"].dtype) == (torch.float64, torch.bfloat16)


def test_recomputation_keeps_the_given_v():
    """It can't be made again: only S isn't kept."""
    arguments = packed(Case(leading=(64,), d=64, experts="projected").make(torch.float32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda tensor: tensor):
        hycam_modulation(**arguments, recompute=True)
    assert sorted(shape for shape in kept if len(shape) == 2 and shape[0] == 64) == [
        (64, 3), (64, 3), (64, 12), (64, 64), (64, 64), (64, 64),
    ]  # fmt: skip


@pytest.mark.parametrize("skipped", ["hidden", "attn_output", "shared_weight", "lora_a", "lora_b", "router_weight"])
def test_gradients_do_not_depend_on_which_are_asked_for(skipped):
    case = CASES["released"]
    whole = run(hycam_modulation, case.make(torch.float64))
    arguments = case.make(torch.float64)
    arguments[skipped].requires_grad_(False)
    for name, value in run(hycam_modulation, arguments).items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("loss", ["balance", "load"])
def test_router_losses_without_the_output(loss):
    """Only the router means are used: the output's gradient is absent."""

    def scalar(output):
        return output.balance_loss if loss == "balance" else (output.load * torch.arange(3)).sum()

    arguments = Case(masked=True, options={"seed": 3}).make(torch.float64)
    wanted = list(leaves(arguments).values())
    got = torch.autograd.grad(scalar(hycam_modulation(**arguments)), wanted)
    want = torch.autograd.grad(scalar(modulation_reference(**arguments)), wanted, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_explicit_noise_equals_seed_and_is_a_constant():
    case = Case(leading=(2, 5))
    arguments = case.make(torch.float32)
    noise = gumbel_noise(12, 10, case.num_experts).view(2, 5, -1)
    from_noise = hycam_modulation(**arguments | {"gumbel": noise.requires_grad_()})
    from_seed = hycam_modulation(**arguments, seed=torch.tensor(12))
    assert torch.equal(from_noise.hidden_states, from_seed.hidden_states)
    (from_noise.hidden_states.sum() + from_noise.balance_loss).backward()
    assert noise.grad is None


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_mixed_dtypes(weight_dtype):
    """fp32 adapters on a bf16 backbone: products in bf16, gradients in the dtype of their tensor."""
    case = Case(biases=True, options={"seed": 3})
    arguments = case.make(torch.bfloat16, weight_dtype)
    arguments["attn_output"] = arguments["attn_output"].detach().float().requires_grad_()
    got = run(hycam_modulation, arguments)
    assert got["hidden_states"].dtype == torch.float32
    assert got["load"].dtype == torch.float32
    for name, leaf in leaves(arguments).items():
        assert got[f"grad_{name}"].dtype == leaf.dtype, name
    assert_as_good_as_eager(lambda arguments: run(hycam_modulation, arguments), case, torch.bfloat16, weight_dtype)


def test_float64_attention_output_beside_float32_hidden():
    """h_att is read in the sum dtype: float64 out, float32's precision."""
    arguments = Case(residual=True, options={"seed": 3}).make(torch.float32)
    arguments["attn_output"] = arguments["attn_output"].detach().double().requires_grad_()
    got = run(hycam_modulation, arguments)
    assert got["hidden_states"].dtype == got["grad_attn_output"].dtype == torch.float64
    narrow = dict(arguments, attn_output=arguments["attn_output"].detach().float().requires_grad_())
    for name, value in run(hycam_modulation, narrow).items():
        torch.testing.assert_close(got[name].to(value.dtype), value, rtol=1e-6, atol=1e-6)
    for name, (whole, _) in errors(got, reference_results(arguments, torch.float64)).items():
        assert whole < 1e-6, (name, whole)


def test_autocast():
    def autocast(arguments):
        for name in ("hidden", "attn_output"):
            arguments[name] = arguments[name].detach().float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            return run(hycam_modulation, arguments)

    case = Case(options={"seed": 3})
    got = autocast(case.make(torch.float32))
    assert got["hidden_states"].dtype == torch.float32
    assert not torch.equal(got["hidden_states"], run(hycam_modulation, case.make(torch.float32))["hidden_states"])
    assert_as_good_as_eager(autocast, case, torch.bfloat16, torch.float32)
    doubles = Case().make(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hycam_modulation(**doubles).hidden_states, hycam_modulation(**doubles)[0])
        assert hycam_modulation(**doubles).hidden_states.dtype == torch.float64


def test_row_strided_and_broadcast_inputs():
    case = Case(leading=(4, 6), residual=True, options={"seed": 3})
    arguments = case.make(torch.float32)
    strided = dict(arguments)
    for name in ("hidden", "attn_output", "residual"):
        wide = torch.full((4, 6, 3 * case.d), float("nan"))
        wide[..., case.d : 2 * case.d] = arguments[name].detach()
        strided[name] = wide[..., case.d : 2 * case.d].requires_grad_()
    strided["lora_a"] = arguments["lora_a"].detach().mT.contiguous().mT.requires_grad_()
    want = run(hycam_modulation, arguments)
    for name, value in run(hycam_modulation, strided).items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5)


def test_no_tokens(case):
    empty = Case(
        (0, 3), case.d, case.num_experts, case.rank, case.shared, case.experts, case.biases, case.residual,
        case.masked, case.options,
    )  # fmt: skip
    arguments = empty.make(torch.float32)
    got = run(hycam_modulation, arguments)
    assert got["hidden_states"].shape == (0, 3, case.d)
    assert got["balance_loss"].item() == 0
    for name, leaf in leaves(arguments).items():
        assert torch.equal(got[f"grad_{name}"], torch.zeros_like(leaf)), name


def test_mask_that_counts_no_token():
    arguments = Case(options={"seed": 3}).make(torch.float32)
    arguments["token_mask"] = torch.zeros(2, 13, dtype=torch.bool)
    out = hycam_modulation(**arguments)
    assert not out.load.any()
    assert not out.router_prob.any()
    out.balance_loss.backward()
    assert not arguments["router_weight"].grad.any()


def test_a_token_that_does_not_count_may_be_nan():
    arguments = Case(leading=(4,)).make(torch.float32)
    arguments["hidden"].data[2] = float("nan")
    arguments["token_mask"] = torch.tensor([True, True, False, True])
    assert modulation_reference(**arguments).load.isfinite().all()
    out = hycam_modulation(**arguments)
    assert out.load.isfinite().all()
    wanted = [arguments[name] for name in ("hidden", "router_weight", "lora_a", "shared_weight")]
    for gradient in torch.autograd.grad(out.balance_loss, wanted):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("hard", [False, True])
def test_a_token_whose_p_is_nan_is_nan(hard):
    arguments = Case(leading=(4,), options={"hard": hard, "gumbel": torch.zeros(4, 3)}).make(torch.float32)
    arguments["gumbel"][2] = float("nan")
    got, want = (function(**arguments) for function in (hycam_modulation, modulation_reference))
    assert want.hidden_states.isnan().sum() == want.hidden_states[2].numel()
    assert want.load.isnan().all()
    for value, expected in zip(got, want, strict=True):
        assert torch.equal(value.isnan(), expected.isnan())


def test_the_smallest_tau():
    for name, value in run(hycam_modulation, Case(options={"tau": 1e-30, "seed": 3}).make(torch.float32)).items():
        assert value.isfinite().all() or name.startswith("grad"), name


def test_balance_gradient_survives_float16():
    """A token's share of it is below float16's smallest number."""
    arguments = Case(leading=(4096,), d=8, rank=2).make(torch.float16, torch.float32)
    (got,) = torch.autograd.grad(hycam_modulation(**arguments).balance_loss / 320, arguments["router_weight"])
    (want,) = torch.autograd.grad(modulation_reference(**arguments).balance_loss / 320, arguments["router_weight"])
    torch.testing.assert_close(got, want, rtol=0.01, atol=0.01 * want.abs().max().item())


def test_without_experts_the_router_results_are_empty():
    out = hycam_modulation(**Case(experts=None).make(torch.bfloat16))
    assert out.load.shape == out.router_prob.shape == (0,)
    assert out.balance_loss.shape == ()
    assert out.balance_loss.item() == 0
    assert out.balance_loss.dtype == torch.float32


def test_caller_tensors_are_untouched(case):
    arguments = case.make(torch.float32)
    before = {name: value.detach().clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    run(hycam_modulation, arguments)
    for name, value in before.items():
        assert torch.equal(arguments[name], value), name


def test_bit_equal_from_run_to_run(case):
    arguments = case.make(torch.bfloat16)
    first = run(hycam_modulation, arguments)
    for name, value in run(hycam_modulation, arguments).items():
        assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("recompute", [False, True])
def test_kept_for_backward(recompute):
    """At most 1 + E r / d + 0.02 activations beyond h and h_att; at most 0.1 when S and V are made again."""
    case = Case(leading=(64,), d=512, num_experts=5, rank=16, options={"seed": 3})
    arguments = case.make(torch.bfloat16)
    kept = kept_bytes(hycam_modulation, arguments, recompute=recompute)
    activation = 64 * 512 * 2
    limit = 0.1 if recompute else 1 + 5 * 16 / 512 + 0.02
    assert kept / activation <= limit + 64 * 5 * 8 / activation
    assert kept


def test_bit_equal_whatever_the_row_block(case, monkeypatch):
    want = run(hycam_modulation, case.make(torch.bfloat16))
    monkeypatch.setattr(torch_backend, "_BLOCK_ELEMENTS", 3 * case.d)
    for name, value in run(hycam_modulation, case.make(torch.bfloat16)).items():
        assert torch.equal(value, want[name]), name


def test_eager_mode_passes_by_the_dispatcher(monkeypatch):
    """And a tracer gets the library's op, forward and backward."""

    class Ops(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.add(str(function))
            return function(*args, **kwargs or {})

    arguments = CASES["released"].make(torch.float32)
    want = run(hycam_modulation, arguments)
    with Ops() as mode:
        got = run(hycam_modulation, arguments)
    assert {"hycam.modulation.default", "hycam.modulation_backward.default"} <= mode.seen
    for name, value in got.items():
        assert torch.equal(value, want[name]), name
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.hycam, "modulation", None)
        patch.setattr(torch.ops.hycam, "modulation_backward", None)
        run(hycam_modulation, arguments)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_fake_tensors(backend):
    arguments = CASES["released"].make(torch.float32)
    with FakeTensorMode() as mode:
        fake = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value for name, value in arguments.items()
        }
        out = hycam_modulation(**fake, backend=backend)
        (grad,) = torch.autograd.grad(out.hidden_states.sum() + out.balance_loss, fake["lora_a"])
    assert out.hidden_states.shape == arguments["hidden"].shape
    assert grad.shape == arguments["lora_a"].shape


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    grads = []
    for checkpointed in (False, True):
        arguments = CASES["paper"].make(torch.float32)

        def function(hidden, arguments=arguments):
            return tuple(hycam_modulation(**arguments | {"hidden": hidden}))

        hidden = arguments["hidden"]
        out = checkpoint(function, hidden, use_reentrant=use_reentrant) if checkpointed else function(hidden)
        (out[0].square().sum() + out[3]).backward()
        grads.append([leaf.grad for leaf in leaves(arguments).values()])
    for want, got in zip(*grads, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["paper", "released", "projected", "shared-only", "full-rank", "no-branch"])
def test_opcheck(name, keep):
    arguments = packed(CASES[name].make(torch.float32))
    call = prepare(**arguments, recompute=not keep, backend="torch")
    torch.library.opcheck(torch.ops.hycam.modulation.default, tuple(call))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(backend):
    arguments = Case(masked=True).make(torch.float32)

    def function(seed, **arguments):
        return hycam_modulation(**arguments, seed=seed)

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for seed in (3, 4, torch.tensor(5)):
        want = run(function, arguments | {"seed": seed})
        for name, value in run(compiled, arguments | {"seed": seed}).items():
            torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-6)


def test_compiles_with_symbolic_options():
    def function(hidden, scale):
        return hycam_modulation(hidden, hidden, torch.eye(8), None, None, None, None, scale=scale).hidden_states

    compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=True)
    hidden = torch.randn(5, 8)
    for scale in (1.0, 2.0):
        assert torch.equal(compiled(hidden, scale), function(hidden, scale))


def test_second_order_gradients_are_refused():
    arguments = Case().make(torch.float64)
    out = hycam_modulation(**arguments).hidden_states.square().sum()
    (grad,) = torch.autograd.grad(out, arguments["shared_weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="second-order"):
        grad.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("grad_mode", [False, True])
def test_forward_mode_is_refused(requires_grad, grad_mode):
    hidden, weight = torch.randn(3, 8), torch.eye(8, requires_grad=requires_grad)
    with forward_ad.dual_level(), torch.set_grad_enabled(grad_mode):
        dual = forward_ad.make_dual(weight, torch.ones(8, 8))
        with pytest.raises(RuntimeError, match="hycam_modulation: forward-mode derivatives are not supported"):
            hycam_modulation(hidden, hidden, dual, None, None, None, None)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacfwd, torch.func.jacrev])
def test_function_transforms_are_refused(transform):
    def function(hidden):
        return hycam_modulation(hidden, hidden, torch.eye(8), None, None, None, None).hidden_states.sum()

    with pytest.raises(RuntimeError, match=r"hycam_modulation: transforms of torch\.func are not supported"):
        transform(function)(torch.randn(3, 8))


def test_explain_backend():
    arguments = Case().make(torch.float32)
    assert explain_backend(**arguments).startswith("torch: the triton backend can't run")
    with pytest.raises(ValueError, match="tau"):
        explain_backend(**arguments, tau=0)


def test_triton_backend_says_why_it_cannot_run():
    with pytest.raises(RuntimeError, match="backend='triton' can't run this call: "):
        hycam_modulation(**Case().make(torch.float32), backend="triton")
