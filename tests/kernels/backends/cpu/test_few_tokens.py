"""Few tokens without gradients in one native pass: as good as eager, and which calls take it."""

from functools import partial

import pytest
import torch

from hycam_kernels import hycam_modulation
from hycam_kernels.backends.cpu import few_tokens
from hycam_kernels.backends.torch import inference
from hycam_kernels.preparation import prepare
from tests.kernels.cases import Case, assert_as_good_as_eager, errors, packed
from tests.kernels.test_inference import detached, outputs, reference_outputs

# vectors' rests, rows long and short, more columns than a thread takes at a time
_CASES = {
    "one": Case((1,), 16, 2, 4),
    "wide": Case((1,), 301, 3, 130),
    "two-released": Case((2,), 70, 5, 9, biases=True, residual=True, options={"hard": True, "scale": 8.0}),
    "three": Case((3, 1), 129, 1, 33, biases=True, options={"tau": 0.3, "seed": 3}),
    "four": Case((2, 2), 577, 5, 17, residual=True, masked=True, options={"scale": 0.5}),
    "full-rank": Case((3,), 45, 3, experts="full", biases=True),
    "shared-alone": Case((4,), 67, experts=None, biases=True),
    "no-shared": Case((2,), 67, shared=False),
}


@pytest.fixture(params=_CASES.values(), ids=_CASES.keys())
def case(request) -> Case:
    return request.param


@pytest.fixture
def alone(monkeypatch, vectors):
    """The pass runs, and torch's path doesn't."""

    def refuse(*_):
        raise AssertionError("torch's path ran")

    monkeypatch.setattr(inference, "forward", refuse)


@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("alone")
def test_as_good_as_eager(case, dtype, weight_dtype):
    run = partial(outputs, hycam_modulation, backend="torch")
    assert_as_good_as_eager(run, case, dtype, weight_dtype, reference=reference_outputs)


@pytest.mark.usefixtures("alone")
def test_nothing_but_the_output_is_rounded(case):
    """Weights in bfloat16 give what the same numbers in float32 give."""
    arguments = case.make(torch.bfloat16)
    wide = {
        name: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    got, want = outputs(hycam_modulation, arguments), outputs(hycam_modulation, wide)
    assert torch.equal(got["hidden_states"], want["hidden_states"].bfloat16())
    assert torch.equal(got["load"], want["load"])


@pytest.mark.usefixtures("alone")
def test_streams_may_lie_amid_other_numbers(case):
    arguments = detached(case.make(torch.float32))
    strided = dict(arguments)
    for name in ("hidden", "attn_output", "residual"):
        if arguments[name] is not None:
            wide = torch.full((*arguments[name].shape[:-1], 2 * case.d), float("nan"))
            wide[..., 1 : case.d + 1] = arguments[name]
            strided[name] = wide[..., 1 : case.d + 1]
    want = outputs(hycam_modulation, arguments)
    for name, value in outputs(hycam_modulation, strided).items():
        assert torch.equal(value, want[name]), name


@pytest.mark.usefixtures("alone")
def test_the_same_bits_on_any_number_of_threads(case):
    arguments = case.make(torch.bfloat16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            found.append(outputs(hycam_modulation, arguments))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(value, found[0][name]) for name, value in other.items())


@pytest.mark.usefixtures("alone")
def test_an_expert_that_a_token_has_not_chosen_may_be_infinite():
    chosen = torch.tensor([0, 1, 0])
    gumbel = 100.0 * torch.nn.functional.one_hot(chosen, 3)
    arguments = detached(Case((3,), options={"hard": True, "gumbel": gumbel}).make(torch.float32))
    arguments["lora_b"] = torch.cat([arguments["lora_b"][:1], torch.full((2, 24, 4), float("inf"))])
    finite = outputs(hycam_modulation, arguments)["hidden_states"].isfinite().all(-1)
    assert finite.tolist() == [True, False, True]


def _call(case: Case, dtype: torch.dtype = torch.float32, **changed):
    with torch.no_grad():
        return prepare(**packed(detached(case.make(dtype))) | changed)


@pytest.mark.usefixtures("vectors")
def test_which_calls_it_takes():
    few = Case((4,))
    assert few_tokens.takes(_call(few)) and few_tokens.takes(_call(few, torch.bfloat16))
    assert not few_tokens.takes(_call(Case((5,)))), "torch's products are faster"
    assert not few_tokens.takes(_call(Case((0,))))
    assert not few_tokens.takes(_call(few, torch.float64))
    assert not few_tokens.takes(_call(few, attn_output=torch.zeros(4, 24, dtype=torch.float64)))
    assert not few_tokens.takes(_call(few, lora_b=torch.zeros(3, 4, 24).mT)), "read as it is stored, row by row"
    assert not few_tokens.takes(_call(few, hidden=torch.zeros(24, 4).T))
    assert not few_tokens.takes(_call(Case((4,), experts="projected")))


def test_without_native_passes_torch_takes_them(choose):
    arguments = Case((2,)).make(torch.float32)
    got = outputs(hycam_modulation, arguments)
    choose("0")
    assert not few_tokens.takes(_call(Case((2,))))
    for name, (whole, _) in errors(outputs(hycam_modulation, arguments), got).items():
        assert whole < 1e-6, name
