"""`norm_project` on the torch backend: values, gradients, dtypes, memory; in autograd and torch.compile."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hycam_kernels import NormProjectOutput, norm_project
from hycam_kernels.inputs import NormProjectInputs
from hycam_kernels.reference import norm_project_reference
from tests.kernels.cases import assert_as_good_as_eager, errors, kept_bytes, leaves
from tests.kernels.norm_cases import NormCase, norm_reference_results, run_norm

CASES = {
    "rms": NormCase(),
    "layer": NormCase(kind="layer", bias=True, eps=1e-5),
    "layer-without-bias": NormCase(kind="layer", eps=1e-5),
    "large-eps": NormCase(eps=2.0),
    "far-from-zero": NormCase(kind="layer", bias=True, offset=20.0),
    "one-token": NormCase(leading=(1,)),
    "no-leading-dimension": NormCase(leading=(), kind="layer"),
    "many-leading-dimensions": NormCase(leading=(2, 1, 3, 2)),
    "one-expert": NormCase(num_experts=1, rank=1),
    "many-experts": NormCase(num_experts=8, rank=5, kind="layer", bias=True),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request) -> NormCase:
    return request.param


def test_equals_reference_in_float64(case):
    arguments = case.make(torch.float64)
    got = run_norm(norm_project, arguments, backend="torch")
    for name, (whole, row) in errors(got, norm_reference_results(arguments, torch.float64)).items():
        assert whole < 1e-12, (name, whole)
        assert row < 1e-11, (name, row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_eager(case, dtype):
    assert_as_good_as_eager(
        lambda arguments: run_norm(norm_project, arguments, backend="torch"),
        case, dtype, reference=norm_reference_results,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_gradcheck(kind):
    arguments = NormCase((2, 3), 5, 2, 3, kind=kind, bias=kind == "layer").make(torch.float64)
    names = list(leaves(arguments))

    def function(*tensors):
        return tuple(norm_project(**arguments | dict(zip(names, tensors, strict=True)), backend="torch"))

    assert torch.autograd.gradcheck(function, tuple(leaves(arguments).values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_llama_and_torch(dtype):
    """hidden is what the backbone's own norm gives, bit for bit for an RMSNorm: an unadapted model stays as it was."""
    arguments = NormCase(leading=(9,)).make(dtype)
    modeling_llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    llama = modeling_llama.LlamaRMSNorm(24, eps=1e-6).to(dtype)
    llama.weight = torch.nn.Parameter(arguments["norm_weight"].detach())
    assert torch.equal(norm_project(**arguments).hidden, llama(arguments["hidden_in"]))

    arguments = NormCase(leading=(9,), kind="layer", bias=True).make(dtype)
    x, weight, bias = (arguments[name].double() for name in ("hidden_in", "norm_weight", "norm_bias"))
    want = torch.nn.functional.layer_norm(x, (24,), weight, bias, 1e-6).to(dtype)
    torch.testing.assert_close(norm_project(**arguments).hidden, want)


@pytest.mark.parametrize("skipped", ["hidden_in", "norm_weight", "norm_bias", "lora_a", "lora_n", "router_weight"])
def test_gradients_do_not_depend_on_which_are_asked_for(skipped):
    whole = run_norm(norm_project, CASES["layer"].make(torch.float64))
    arguments = CASES["layer"].make(torch.float64)
    arguments[skipped].requires_grad_(False)
    for name, value in run_norm(norm_project, arguments).items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("used", ["hidden", "v", "logits"])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_gradients_of_one_result_alone(kind, used):
    arguments = NormCase(kind=kind).make(torch.float64)
    wanted = list(leaves(arguments).values())
    got = torch.autograd.grad(getattr(norm_project(**arguments), used).square().sum(), wanted)
    cast = NormCase(kind=kind).make(torch.float64)
    truth = norm_project_reference(**cast)
    want = torch.autograd.grad(getattr(truth, used).square().sum(), list(leaves(cast).values()), allow_unused=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_mixed_dtypes():
    """fp32 adapters on a bf16 backbone: products in bf16, gradients in the dtype of their tensor."""
    arguments = NormCase().make(torch.bfloat16, torch.float32)
    got = run_norm(norm_project, arguments)
    assert got["hidden"].dtype == got["v"].dtype == torch.bfloat16
    assert got["logits"].dtype == torch.float32
    for name, leaf in leaves(arguments).items():
        assert got[f"grad_{name}"].dtype == leaf.dtype, name
    assert_as_good_as_eager(
        lambda arguments: run_norm(norm_project, arguments),
        NormCase(), torch.bfloat16, torch.float32, reference=norm_reference_results,
    )  # fmt: skip


def test_norm_weight_of_a_wider_dtype():
    """A trained fp32 norm on bf16 activations gives fp32, as `weight * x` does."""
    arguments = NormCase().make(torch.bfloat16)
    arguments["norm_weight"] = arguments["norm_weight"].detach().float().requires_grad_()
    got = run_norm(norm_project, arguments)
    assert got["hidden"].dtype == got["v"].dtype == got["grad_norm_weight"].dtype == torch.float32
    assert got["grad_hidden_in"].dtype == torch.bfloat16


def test_autocast():
    arguments = NormCase().make(torch.float32)
    plain = norm_project(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = norm_project(**arguments)
        results = run_norm(norm_project, arguments)
    assert torch.equal(mixed.hidden, plain.hidden)
    assert mixed.v.dtype == torch.bfloat16
    assert mixed.logits.dtype == torch.float32
    assert not torch.equal(mixed.logits, plain.logits)
    for name, leaf in leaves(arguments).items():
        assert results[f"grad_{name}"].dtype == leaf.dtype, name

    def autocast(arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return run_norm(norm_project, cast(arguments))

    def cast(arguments):
        return {k: v.detach().float().requires_grad_() if isinstance(v, Tensor) else v for k, v in arguments.items()}

    assert_as_good_as_eager(autocast, NormCase(), torch.bfloat16, reference=norm_reference_results)


def test_row_strided_input():
    case = NormCase(leading=(4, 6), kind="layer", bias=True)
    arguments = case.make(torch.float32)
    wide = torch.full((4, 6, 3 * case.d), float("nan"))
    wide[..., case.d : 2 * case.d] = arguments["hidden_in"].detach()
    strided = arguments | {
        "hidden_in": wide[..., case.d : 2 * case.d].requires_grad_(),
        "lora_a": arguments["lora_a"].detach().mT.contiguous().mT.requires_grad_(),
    }
    want = run_norm(norm_project, arguments)
    for name, value in run_norm(norm_project, strided).items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_no_tokens(kind):
    arguments = NormCase((0, 3), kind=kind, bias=kind == "layer").make(torch.float32)
    got = run_norm(norm_project, arguments)
    assert got["hidden"].shape == (0, 3, 24)
    assert got["v"].shape == (0, 3, 3, 4)
    assert got["logits"].shape == (0, 3, 3)
    for name, leaf in leaves(arguments).items():
        assert torch.equal(got[f"grad_{name}"], torch.zeros_like(leaf)), name


def test_bit_equal_from_run_to_run_and_callers_tensors_untouched(case):
    arguments = case.make(torch.bfloat16)
    before = {name: value.detach().clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    first = run_norm(norm_project, arguments)
    for name, value in run_norm(norm_project, arguments).items():
        assert torch.equal(value, first[name]), name
    for name, value in before.items():
        assert torch.equal(arguments[name], value), name


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_kept_for_backward(kind):
    """Beside the arguments and h, one or two float32 numbers a token."""
    arguments = NormCase(leading=(64,), d=512, kind=kind).make(torch.bfloat16)
    kept = kept_bytes(norm_project, arguments)
    hidden = 64 * 512 * 2
    assert 0 < kept - hidden <= 64 * 4 * (1 if kind == "rms" else 2)


@pytest.mark.parametrize("name", ["rms", "layer"])
def test_opcheck(name):
    arguments = CASES[name].make(torch.float32)
    arguments["hidden_in"] = arguments["hidden_in"].detach().flatten(0, -2).requires_grad_()
    call = NormProjectInputs(**arguments, compute_dtype=torch.float32, backend="torch")
    torch.library.opcheck(torch.ops.hycam.norm_project.default, tuple(call))


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(backend, kind):
    arguments = NormCase(kind=kind).make(torch.float32)
    compiled = torch.compile(norm_project, backend=backend, fullgraph=True)
    want = run_norm(norm_project, arguments)
    for name, value in run_norm(compiled, arguments).items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-6)


def test_gradients_under_checkpointing():
    arguments = NormCase().make(torch.float32)

    def checkpointed(**arguments):
        call = list(arguments.values())
        return NormProjectOutput(
            *checkpoint(
                lambda *values: norm_project(**dict(zip(arguments, values, strict=True))),
                *call,
                use_reentrant=False,
            )
        )

    want = run_norm(norm_project, arguments)
    for name, value in run_norm(checkpointed, arguments).items():
        assert torch.equal(value, want[name]), name


def test_second_order_gradients_are_refused():
    arguments = NormCase().make(torch.float64)
    (grad,) = torch.autograd.grad(norm_project(**arguments).v.square().sum(), arguments["lora_a"], create_graph=True)
    with pytest.raises(RuntimeError, match="second-order"):
        grad.sum().backward()


def test_triton_backend_says_why_it_cannot_run():
    with pytest.raises(RuntimeError, match="backend='triton' can't run this call: "):
        norm_project(**NormCase().make(torch.float64), backend="triton")


def zeros(*shape, dtype=torch.float32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


D, E, R = 24, 3, 4
BAD_VALUES = {
    "hidden_in-scalar": ({"hidden_in": zeros()}, "hidden_in must be", "()"),
    "hidden_in-empty": ({"hidden_in": zeros(2, 0)}, "hidden_in must be", "(2, 0)"),
    "norm_weight": ({"norm_weight": zeros(D + 1)}, "norm_weight must have shape (24,)", "(25,)"),
    "norm_bias": ({"norm_bias": zeros(1)}, "norm_bias must have shape (24,)", "(1,)"),
    "lora_a": ({"lora_a": zeros(E, R, D + 1)}, "lora_a must have shape (3, 4, 24)", "(3, 4, 25)"),
    "lora_a-dims": ({"lora_a": zeros(R, D)}, "lora_a must be [E, r, d]", "(4, 24)"),
    "no-experts": ({"lora_a": zeros(0, R, D)}, "E >= 1", "(0, 4, 24)"),
    "lora_n": ({"lora_n": zeros(E, R, R + 1)}, "lora_n must have shape (3, 4, 4)", "(3, 4, 5)"),
    "router_weight": ({"router_weight": zeros(E + 1, D)}, "router_weight must have shape (3, 24)", "(4, 24)"),
    "device": ({"lora_n": zeros(E, R, R, device="meta")}, "lora_n must be on hidden_in's device cpu", "meta"),
    "kind": ({"kind": "batch"}, "kind must be one of rms, layer", "'batch'"),
    "rms-bias": ({"kind": "rms", "norm_bias": zeros(D)}, "norm_bias must be None", "kind='rms'"),
    "eps-negative": ({"eps": -1e-6}, "eps must be 0 or more", "-1e-06"),
    "eps-nan": ({"eps": float("nan")}, "eps must be", "nan"),
    "backend": ({"backend": "cuda"}, "backend must be one of auto, torch, triton", "'cuda'"),
}
BAD_TYPES = {
    "hidden_in-none": ({"hidden_in": None}, "hidden_in must be a tensor", "None"),
    "lora_a-none": ({"lora_a": None}, "lora_a must be a tensor", "None"),
    "norm_weight-int": ({"norm_weight": zeros(D, dtype=torch.int64)}, "norm_weight must be float64", "torch.int64"),
    "router-list": ({"router_weight": [1.0]}, "router_weight must be a tensor", "list"),
}


@pytest.mark.parametrize(
    ("error", "changes", "wanted", "given"),
    [
        pytest.param(error, *values, id=name)
        for error, table in ((ValueError, BAD_VALUES), (TypeError, BAD_TYPES))
        for name, values in table.items()
    ],
)
def test_argument_errors(error, changes, wanted, given):
    arguments = NormCase(kind="layer").make(torch.float32)
    with pytest.raises(error, match="norm_project") as raised:
        norm_project(**arguments | changes)
    assert wanted in str(raised.value)
    assert given in str(raised.value)
    assert "\n" not in str(raised.value)
