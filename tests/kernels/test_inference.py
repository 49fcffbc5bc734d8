"""The op without gradients: few tokens' own path, the router's means that are made when read, the checks made once."""

import math
import pickle
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hycam_kernels import checks, hycam_modulation
from hycam_kernels.backends.torch import inference
from hycam_kernels.backends.torch import modulation as torch_backend
from hycam_kernels.modulation import modulate
from hycam_kernels.output import DeferredRouterMeans
from hycam_kernels.preparation import prepare
from hycam_kernels.reference import modulation_reference
from tests.kernels.cases import Case, assert_as_good_as_eager, cast_floats, errors, packed
from tests.kernels.test_modulation import CASES

CASES = CASES | {
    "one-token-released": Case(leading=(1, 1), biases=True, residual=True, options={"hard": True, "scale": 8.0}),
    "one-token-full-rank": Case(leading=(1,), experts="full", biases=True),
    "one-token-projected": Case(leading=(1,), experts="projected", options={"scale": 2.0}),
    "one-token-masked": Case(leading=(1, 1), masked=True),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request) -> Case:
    return request.param


def detached(arguments: dict) -> dict:
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def outputs(function, arguments: dict, **options) -> dict[str, Tensor]:
    with torch.no_grad():
        return function(**packed(detached(arguments)), **options)._asdict()


def reference_outputs(arguments: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    return outputs(modulation_reference, cast_floats(arguments, dtype))


@pytest.fixture
def without_the_other_path(monkeypatch):
    """What reaches the path with a backward fails."""

    def refuse(*_):
        raise AssertionError("the path with a backward ran")

    monkeypatch.setattr(torch_backend, "forward", refuse)


@pytest.mark.usefixtures("without_the_other_path")
def test_equals_reference_in_float64(case):
    arguments = case.make(torch.float64)
    got, want = outputs(hycam_modulation, arguments, backend="torch"), reference_outputs(arguments, torch.float64)
    assert {name: value.dtype for name, value in got.items()} == {name: value.dtype for name, value in want.items()}
    for name, (whole, row) in errors(got, want).items():
        assert whole < 1e-12, (name, whole)
        assert row < 1e-11, (name, row)


@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("without_the_other_path")
def test_low_precision_is_as_good_as_eager(case, dtype, weight_dtype):
    run = partial(outputs, hycam_modulation, backend="torch")
    assert_as_good_as_eager(run, case, dtype, weight_dtype, reference=reference_outputs)


@pytest.mark.parametrize("attn_dtype", [torch.float64, torch.bfloat16])
def test_output_has_the_attention_outputs_dtype(attn_dtype):
    arguments = Case(residual=True).make(torch.float32)
    arguments["attn_output"] = arguments["attn_output"].detach().to(attn_dtype)
    got = outputs(hycam_modulation, arguments)["hidden_states"]
    want = modulation_reference(**cast_floats(arguments, torch.float64)).hidden_states
    assert got.dtype == attn_dtype
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-2 if attn_dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast(weight_dtype):
    case = Case(biases=True, residual=True, options={"seed": 3})

    def run(arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return outputs(hycam_modulation, arguments)

    # the errors that eager makes where everything is in autocast's dtype
    def reference(arguments, dtype):
        return reference_outputs(arguments, torch.bfloat16 if dtype == torch.float32 else dtype)

    got = run(case.make(torch.float32, weight_dtype))
    assert got["hidden_states"].dtype == torch.float32
    assert_as_good_as_eager(run, case, torch.float32, weight_dtype, reference=reference)


def test_strides_change_nothing(case):
    arguments = detached(case.make(torch.float32))
    strided = dict(arguments)
    for name in ("hidden", "attn_output", "residual"):
        if arguments[name] is not None:
            wide = torch.full((*arguments[name].shape[:-1], 2 * case.d), float("nan"))
            wide[..., : case.d] = arguments[name]
            strided[name] = wide[..., : case.d]
    for name in ("shared_weight", "lora_a", "lora_n", "lora_b", "router_weight", "expert_weight"):
        if arguments.get(name) is not None:
            strided[name] = arguments[name].mT.contiguous().mT
    want = outputs(hycam_modulation, arguments)
    for name, value in outputs(hycam_modulation, strided).items():
        assert value.is_contiguous(), name
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5)


def test_a_transposed_attention_output_gives_a_dense_result():
    arguments = detached(Case(leading=(6,)).make(torch.float32))
    arguments["attn_output"] = arguments["attn_output"].T.contiguous().T
    assert outputs(hycam_modulation, arguments)["hidden_states"].is_contiguous()


def test_no_tokens(case):
    empty = Case(
        (0, 3), case.d, case.num_experts, case.rank, case.shared, case.experts, case.biases, case.residual,
        case.masked, case.options,
    )  # fmt: skip
    got = outputs(hycam_modulation, empty.make(torch.float32))
    assert got["hidden_states"].shape == (0, 3, case.d)
    assert not got["load"].any()
    assert got["balance_loss"].item() == 0


def test_bit_equal_from_run_to_run_and_caller_tensors_are_untouched(case):
    arguments = detached(case.make(torch.bfloat16))
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    first = outputs(hycam_modulation, arguments)
    for name, value in outputs(hycam_modulation, arguments).items():
        assert torch.equal(value, first[name]), name
        assert all(value.data_ptr() != given.data_ptr() for given in before.values() if value.numel())
    for name, value in before.items():
        assert torch.equal(arguments[name], value), name


def test_an_expert_that_is_not_chosen_may_be_infinite():
    arguments = detached(Case(leading=(4,), options={"hard": True}).make(torch.float32))
    arguments["router_weight"] = torch.zeros(3, 24)
    arguments["lora_b"] = torch.cat([arguments["lora_b"][:1], torch.full((2, 24, 4), float("inf"))])
    assert outputs(hycam_modulation, arguments)["hidden_states"].isfinite().all()


@pytest.mark.parametrize("hard", [False, True])
def test_a_token_whose_p_is_nan_is_nan(hard):
    arguments = Case(leading=(4,), options={"hard": hard, "gumbel": torch.zeros(4, 3)}).make(torch.float32)
    arguments["gumbel"][2] = float("nan")
    got, want = (outputs(function, arguments) for function in (hycam_modulation, modulation_reference))
    for name, value in got.items():
        assert torch.equal(value.isnan(), want[name].isnan()), name


def test_a_token_that_does_not_count_may_be_nan():
    arguments = Case(leading=(4,)).make(torch.float32)
    arguments["hidden"].data[2] = float("nan")
    arguments["token_mask"] = torch.tensor([True, True, False, True])
    got, want = (outputs(function, arguments) for function in (hycam_modulation, modulation_reference))
    torch.testing.assert_close(got["load"], want["load"])
    arguments["token_mask"] = torch.zeros(4, dtype=torch.bool)
    assert outputs(hycam_modulation, arguments)["balance_loss"] == 0


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(("tokens", "dtype", "most"), [
    (1, torch.float32, 26), (1, torch.bfloat16, 35), (80, torch.float32, 30), (80, torch.bfloat16, 39),
])  # fmt: skip
def test_few_operations(tokens, dtype, most):
    """Whatever the number of experts; views among them."""
    seen = []
    for experts in (2, 7):
        arguments = detached(Case(leading=(1, tokens), num_experts=experts).make(dtype))
        with torch.no_grad(), Operations() as mode:
            call = prepare(**arguments, backend="torch")
            _, probs, logits = inference.forward(call)
            means = DeferredRouterMeans(probs, logits, call.token_mask)
            assert means.balance_loss.ndim == 0
        seen.append(mode.seen)
    assert seen[0] == seen[1]
    assert len(seen[0]) <= most, (len(seen[0]), seen[0])


def ran_inference(arguments, monkeypatch, **options) -> bool:
    """Whether the path of its own took the call."""
    ran = []
    with monkeypatch.context() as patch:
        own = inference.forward
        patch.setattr(inference, "forward", lambda call: ran.append(call) or own(call))
        hycam_modulation(**arguments, **options)
    return bool(ran)


def test_which_calls_take_the_path_of_their_own(monkeypatch):
    arguments = Case().make(torch.float32)
    weights_alone = arguments | {name: arguments[name].detach() for name in ("hidden", "attn_output")}
    assert not ran_inference(arguments, monkeypatch)
    assert not ran_inference(weights_alone, monkeypatch)
    assert not ran_inference(detached(arguments), monkeypatch), "the bits of weights that are trained"
    with torch.no_grad():
        assert ran_inference(detached(arguments), monkeypatch)
        assert ran_inference(weights_alone, monkeypatch)
        assert not ran_inference(arguments, monkeypatch), "a checkpoint's first forward"
    with torch.inference_mode():
        assert ran_inference(weights_alone, monkeypatch)


@pytest.mark.parametrize("grad_mode", [False, True])
def test_frozen_weights_give_the_bits_of_trained_ones(grad_mode):
    arguments = Case().make(torch.float32)
    inside = arguments | {name: arguments[name].detach() for name in ("hidden", "attn_output")}
    with torch.set_grad_enabled(grad_mode):
        for frozen, trained in zip(hycam_modulation(**detached(arguments)), hycam_modulation(**inside), strict=True):
            assert torch.equal(frozen, trained)


def test_a_checkpoints_first_forward_is_its_second(monkeypatch):
    """A layer in training runs the same arithmetic with and without gradients."""
    arguments = Case().make(torch.float32)
    inside = arguments | {name: arguments[name].detach() for name in ("hidden", "attn_output")}
    with torch.no_grad():
        first = modulate(**inside, training=True).hidden_states
    assert torch.equal(first, modulate(**inside, training=True).hidden_states)


@torch.no_grad()
def test_many_tokens_take_bounded_memory(monkeypatch):
    """No tensor of all experts' outputs: the path with a backward makes one expert after the other."""
    monkeypatch.setattr(inference, "_MAX_ELEMENTS", 3 * 24 * 26)
    assert ran_inference(detached(Case(leading=(26,)).make(torch.float32)), monkeypatch)
    many = detached(Case(leading=(27,)).make(torch.float32))
    assert not ran_inference(many, monkeypatch)
    few = outputs(hycam_modulation, many)
    monkeypatch.undo()
    for name, value in outputs(hycam_modulation, many).items():
        torch.testing.assert_close(value, few[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["paper", "released", "projected", "shared-only", "full-rank", "no-branch"])
def test_opcheck(name):
    with torch.no_grad():
        call = prepare(**packed(detached(CASES[name].make(torch.float32))), backend="torch")
    assert call.inference
    torch.library.opcheck(
        torch.ops.hycam.modulation.default, tuple(call), test_utils=["test_schema", "test_faketensor"]
    )


@pytest.mark.parametrize("name", ["one-token-masked", "released", "no-branch"])
def test_compiles_into_one_graph(name, monkeypatch):
    arguments = packed(detached(CASES[name].make(torch.float32)))
    torch._dynamo.reset()
    compiled = torch.compile(hycam_modulation, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        want = hycam_modulation(**arguments)
        for value, expected in zip(compiled(**arguments), want, strict=True):
            assert torch.equal(value, expected)


@torch.no_grad()
def test_means_are_made_when_they_are_read():
    arguments = detached(Case(masked=True, options={"seed": 3}).make(torch.float32))
    want = hycam_modulation(**arguments)
    out = modulate(**arguments, training=False)
    assert isinstance(out.means, DeferredRouterMeans)
    assert not {"load", "router_prob", "balance_loss"} & vars(out.means).keys()
    means = pickle.loads(pickle.dumps(out.means))
    for name in ("load", "router_prob", "balance_loss"):
        assert torch.equal(getattr(means, name), getattr(want, name)), name
    assert torch.equal(out.hidden_states, want.hidden_states)


def test_what_has_passed_is_not_checked_again(monkeypatch):
    arguments = detached(Case(leading=(5, 2), options={"tau": 0.3125}).make(torch.float32))
    hycam_modulation(**arguments)
    made = []
    check = checks._check
    monkeypatch.setattr(checks, "_check", lambda *given: made.append(given) or check(*given))
    hycam_modulation(**detached(Case(leading=(5, 2), options={"tau": 0.3125}).make(torch.float32, seed=1)))
    assert not made
    for changed in ({"tau": 0.25}, {"seed": 1}, {"shared_weight": torch.eye(24, dtype=torch.float64)}):
        hycam_modulation(**arguments | changed)
    assert len(made) == 3


@pytest.mark.parametrize(("changed", "error"), [
    ({"tau": True}, TypeError), ({"tau": math.nan}, ValueError), ({"scale": torch.tensor(1.0)}, TypeError),
    ({"seed": True}, TypeError), ({"seed": 1 << 64}, ValueError), ({"backend": ["torch"]}, ValueError),
    ({"lora_a": torch.zeros(3, 4, 23)}, ValueError), ({"router_weight": [1.0]}, TypeError),
    ({"hidden": torch.zeros(2, 13, 24, dtype=torch.int64)}, TypeError),
])  # fmt: skip
def test_a_wrong_call_is_refused_each_time_after_a_right_one(changed, error):
    arguments = detached(Case(options={"tau": 1.0}).make(torch.float32))
    hycam_modulation(**arguments)
    for _ in range(2):
        with pytest.raises(error, match=next(iter(changed))):
            hycam_modulation(**arguments | changed)
