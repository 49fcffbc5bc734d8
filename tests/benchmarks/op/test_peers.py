"""The peers compute the same op, and a wrong result is found whatever part of it is wrong."""

import dataclasses

import pytest
import torch

from benchmarks.harness.memory import kept_bytes
from benchmarks.op.checks import Oracle, WrongResultError
from benchmarks.op.peers import Peer, eager, leaves, make_arguments, peer, work
from benchmarks.op.released import noisy_logits, released_layer
from benchmarks.op.shapes import Shape
from hycam_kernels.reference import modulation_reference

SHAPE = Shape(70, 32, num_experts=3, rank=8)
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["eager", "torch", "torch-recompute", "released", "torch-released"])
def test_every_peer_is_right(name, dtype):
    candidate = peer(name)
    Oracle(make_arguments(SHAPE, dtype, CPU, candidate.variant), candidate.variant).check(candidate)


@pytest.mark.parametrize("name", ["eager", "torch"])
def test_inference_is_right_and_keeps_nothing(name):
    arguments = make_arguments(SHAPE, torch.bfloat16, CPU, noise=False)
    Oracle(arguments, "paper", inference=True).check(peer(name))
    one = work(peer(name).call, [arguments], "inference")
    assert not one.run(one.setup(0))[0].requires_grad


def test_compiled_reference_is_right():
    call = torch.compile(eager, backend="aot_eager", fullgraph=True)
    Oracle(make_arguments(SHAPE, torch.float32, CPU), "paper").check(Peer("compile", "paper", call))


def test_a_compiled_peer_is_measured_and_timed_like_any_other():
    """What counts its bytes must not keep it from compiling."""
    arguments = make_arguments(SHAPE, torch.float32, CPU)
    call = torch.compile(eager, backend="aot_eager", fullgraph=True, dynamic=False)
    Oracle(arguments, "paper").check(Peer("compile", "paper", call))
    assert 0 < kept_bytes(call, arguments) <= 1.5 * kept_bytes(eager, arguments)
    one = work(call, [arguments], "both")
    assert len(one.run(one.setup(0))) == len(leaves(arguments))


def wrong_value(arguments):
    out, balance = eager(arguments)
    return out * 1.02, balance


def wrong_row(arguments):
    out, balance = eager(arguments)
    bump = torch.zeros_like(out)
    bump[3] = 0.3
    return out + bump, balance


def one_row_slightly_wrong(arguments):
    """Too little of the whole to be seen there."""
    out, balance = eager(arguments)
    bump = torch.zeros_like(out)
    bump[3] = 0.1 * out[3]
    return out + bump, balance


def wrong_balance(arguments):
    out, balance = eager(arguments)
    return out, balance * 1.001


def lost_gradient(arguments):
    return eager(arguments | {"lora_n": arguments["lora_n"].detach() + 0 * arguments["lora_n"]})


def not_finite(arguments):
    out, balance = eager(arguments)
    return out + torch.where(torch.arange(out.shape[1]) == 5, torch.nan, 0.0).to(out.dtype), balance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fault", [wrong_value, wrong_row, one_row_slightly_wrong, wrong_balance, lost_gradient, not_finite]
)
def test_a_fault_is_found(fault, dtype):
    oracle = Oracle(make_arguments(SHAPE, dtype, CPU), "paper")
    oracle.check(Peer("right", "paper", eager))
    with pytest.raises(WrongResultError, match=r"faulty: .* not timed"):
        oracle.check(Peer("faulty", "paper", fault))


def test_released_formulation_is_the_paper_op_with_its_options():
    """In float64, with the generator's own noise: the residual stream after attention."""
    arguments = make_arguments(SHAPE, torch.float64, CPU, "released")
    tensors = {name: tensor for name, tensor in arguments.items() if name not in ("seed", "gumbel")}
    state = torch.get_rng_state()
    noisy = noisy_logits(*(arguments[name] for name in ("hidden", "router_weight", "router_bias")))
    torch.set_rng_state(state)
    got = released_layer(**tensors, tau=0.5, scale=4.0)
    logits = torch.nn.functional.linear(
        *(arguments[name] for name in ("hidden", "router_weight", "router_bias")),
    )
    want = modulation_reference(**tensors, tau=0.5, hard=True, scale=4.0, gumbel=noisy - logits)
    torch.testing.assert_close(got, arguments["residual"] + want.hidden_states)
    assert not torch.equal(noisy, logits)


def test_arguments_do_not_repeat_and_are_not_zero():
    first, second = (make_arguments(SHAPE, torch.bfloat16, CPU, "released", seed) for seed in (0, 1))
    for name, tensor in first.items():
        assert tensor.abs().max() > 0, name
        assert not torch.equal(tensor, second[name]), name
    assert {id(first[name]) for name in ("router_weight", "router_bias")}.isdisjoint(map(id, leaves(first)))


@pytest.mark.parametrize("pass_", ["forward", "backward", "both"])
def test_work_runs_the_pass_that_it_names(pass_):
    """The backward's forward belongs to its setup."""
    calls = []

    def call(arguments):
        calls.append("forward")
        return eager(arguments)

    arguments = make_arguments(SHAPE, torch.float32, CPU)
    one = work(call, [arguments], pass_)
    calls.clear()
    state = one.setup(0)
    assert calls == (["forward"] if pass_ == "backward" else [])
    result = one.run(state)
    assert len(calls) == 1
    assert one.on_device == (pass_ == "backward")
    assert len(result) == (2 if pass_ == "forward" else len(leaves(arguments)))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'fast'"):
        peer("fast")
    with pytest.raises(ValueError, match="'fused-twice'"):
        peer("fused-twice")
    with pytest.raises(ValueError, match="'sideways'"):
        work(eager, [make_arguments(SHAPE, torch.float32, CPU)], "sideways")


def test_shapes_are_those_of_the_arguments():
    shape = dataclasses.replace(SHAPE, num_experts=2)
    arguments = make_arguments(shape, torch.float32, CPU)
    assert arguments["lora_b"].shape == (2, 32, 8)
    assert arguments["gumbel"].shape == (70, 2)
