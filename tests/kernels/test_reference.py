"""The reference against equations written out by hand, and its gradients against finite differences."""

import math

import pytest
import torch

from hycam_kernels import gumbel_noise
from hycam_kernels.reference import modulation_reference
from tests.kernels.cases import Case, leaves


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def test_one_token_by_hand():
    d, E, r = 2, 2, 1
    h, h_att = [0.5, -1.0], [2.0, 3.0]
    shared = [[0.1, 0.2], [0.3, -0.4]]
    a, n, b = [[[1.0, 2.0]], [[-1.0, 0.5]]], [[[2.0]], [[0.5]]], [[[1.0], [-1.0]], [[0.5], [2.0]]]
    router = [[1.0, 0.0], [0.0, 1.0]]
    g, tau = [0.2, -0.3], 0.5

    exps = [math.exp((h[k] + g[k]) / tau) for k in range(E)]
    p = [e / sum(exps) for e in exps]
    q = [math.exp(h[k]) / sum(map(math.exp, h)) for k in range(E)]
    want = []
    for i in range(d):
        fusion = silu(sum(shared[i][j] * h[j] for j in range(d)))
        for k in range(E):
            v = n[k][0][0] * sum(a[k][0][j] * h[j] for j in range(d))
            fusion += p[k] * silu(b[k][i][0] * v)
        want.append(h_att[i] + h_att[i] * fusion)

    def tensor(values):
        return torch.tensor(values, dtype=torch.float64)

    out = modulation_reference(
        tensor([h]), tensor([h_att]), tensor(shared), tensor(a), tensor(n), tensor(b), tensor(router),
        tau=tau, gumbel=tensor([g]),
    )  # fmt: skip
    assert r == 1
    torch.testing.assert_close(out.hidden_states, tensor([want]))
    torch.testing.assert_close(out.load, tensor(p))
    torch.testing.assert_close(out.balance_loss, tensor(sum(x * y for x, y in zip(p, q, strict=True))))


def test_uniform_routing_costs_one_over_experts():
    arguments = Case(num_experts=5).make(torch.float64)
    arguments["router_weight"] = torch.zeros(5, 24, dtype=torch.float64)
    assert modulation_reference(**arguments).balance_loss.item() == pytest.approx(1 / 5)


def test_zero_weights_leave_the_attention_output_bit_equal():
    arguments = Case().make(torch.bfloat16)
    for name in ("shared_weight", "lora_b"):
        arguments[name] = torch.zeros_like(arguments[name])
    out = modulation_reference(**arguments, seed=3)
    assert torch.equal(out.hidden_states, arguments["attn_output"])


def test_residual_gives_the_released_layer():
    arguments = Case(residual=True).make(torch.float64)
    out = modulation_reference(**arguments)
    ones = arguments | {"attn_output": torch.ones_like(arguments["attn_output"]), "residual": None}
    one_plus_fusion = modulation_reference(**ones).hidden_states
    released = (arguments["residual"] + arguments["attn_output"]) * one_plus_fusion
    torch.testing.assert_close(arguments["residual"] + out.hidden_states, released)


def test_seed_is_the_noise_of_gumbel_noise():
    case = Case(leading=(3, 5))
    arguments = case.make(torch.float64)
    noise = gumbel_noise(11, 15, case.num_experts).view(3, 5, -1)
    from_seed = modulation_reference(**arguments | {"seed": 11})
    from_noise = modulation_reference(**arguments | {"gumbel": noise})
    assert torch.equal(from_seed.hidden_states, from_noise.hidden_states)
    assert not torch.equal(from_seed.load, modulation_reference(**arguments).load)


def test_hard_routing_is_one_hot_with_the_soft_gradient():
    case = Case(options={"seed": 5})
    soft, hard = (case.make(torch.float64) for _ in range(2))
    upstream = torch.linspace(1, 2, case.num_experts, dtype=torch.float64)
    (modulation_reference(**soft).load * upstream).sum().backward()
    out = modulation_reference(**hard, hard=True)
    (out.load * upstream).sum().backward()
    counts = out.load.detach() * 26
    torch.testing.assert_close(counts, counts.round())
    torch.testing.assert_close(hard["router_weight"].grad, soft["router_weight"].grad)


@pytest.mark.parametrize(
    "case",
    [
        Case((2, 3), 5, 2, 3, biases=True, residual=True, masked=True, options={"seed": 1, "scale": 1.7}),
        Case((4,), 4, 2, 1, shared=False),
        Case((4,), 4, experts="full", num_experts=2, biases=True),
        Case((4,), 4, experts=None, biases=True),
    ],
    ids=["everything", "experts-only", "full-rank", "shared-only"],
)
def test_gradients_by_finite_differences(case):
    arguments = case.make(torch.float64)
    names = list(leaves(arguments))

    def function(*tensors):
        out = modulation_reference(**arguments | dict(zip(names, tensors, strict=True)))
        return out.hidden_states, out.load, out.router_prob, out.balance_loss

    assert torch.autograd.gradcheck(function, tuple(leaves(arguments).values()))
