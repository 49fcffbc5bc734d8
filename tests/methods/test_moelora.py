"""MoE-LoRA and the gate corrections of RieMoE-LoRA against their formulas, token by token."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hycam.methods import MoeLoraLinear
from tests.methods.builders import adapter, gradients_of, inputs, layer, moelora

CORRECTIONS = ["none", "engineering", "theoretical"]


def gates_of(token, gate, top_k):
    """Softmax, the `top_k` largest, renormalised: a list, so that no vectorised code is shared."""
    scores = [(gate[i] * token).sum() for i in range(len(gate))]
    total = sum(score.exp() for score in scores)
    shares = [score.exp() / total for score in scores]
    kept = sorted(range(len(gate)), key=lambda i: -shares[i].item())[:top_k]
    left = sum(shares[i] for i in kept)
    return [shares[i] / left if i in kept else None for i in range(len(gate))]


def formula(made, x, correction="none", expert_input=None):
    """y = W x + b + sum_i g_i (alpha / r) B_i A_i x, with out_i = q E_i + (g - q) stop(E_i) for a correction."""
    config, weights = made.adapter_configs["default"], adapter(made)
    tokens = x.reshape(-1, x.shape[-1])
    dropped = tokens if expert_input is None else expert_input.reshape(-1, x.shape[-1])
    rows = []
    for token, through in zip(tokens, dropped, strict=True):
        y = made.base_layer.weight @ token + made.base_layer.bias
        for i, g in enumerate(gates_of(token, weights["moelora_gate"], config.top_k)):
            if g is None:
                continue
            expert = 6 / 4 * (weights["moelora_B"][i] @ (weights["moelora_A"][i] @ through))
            q = {"none": g, "engineering": g.detach().sqrt(), "theoretical": torch.ones_like(g)}[correction]
            y = y + (g * expert if correction == "none" else q * expert + (g - q) * expert.detach())
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize(("leading", "top_k"), [((2, 3), 2), ((4,), 1), ((1,), 4), ((3,), 3)])
def test_the_formula_and_its_gradients(leading, top_k, correction):
    made = layer(moelora(top_k=top_k, gate_correction=correction))
    x = inputs(*leading)
    got, want = made(x), formula(made, x, correction)
    torch.testing.assert_close(got, want)
    leaves = [x, *adapter(made).values()]
    upstream = torch.randn_like(want)
    for mine, theirs in zip(gradients_of(got, upstream, leaves), gradients_of(want, upstream, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)
    if top_k == 1:
        return  # the one gate is 1 whatever the logits are
    assert gradients_of(made(x), upstream, [adapter(made)["moelora_gate"]])[0].any()


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_no_token(correction):
    made = layer(moelora(gate_correction=correction))
    x = inputs(0)
    got = made(x)
    got.sum().backward()
    assert got.shape == (0, 6)
    assert not any(parameter.grad.any() for parameter in adapter(made).values())


def test_a_correction_changes_gradients_and_no_output():
    outputs, gradients = [], []
    for correction in CORRECTIONS:
        made = layer(moelora(gate_correction=correction))
        out = made(inputs(5))
        outputs.append(out)
        gradients.append(gradients_of(out, torch.ones_like(out), list(adapter(made).values())))
    for output, (grad_a, grad_b, grad_gate) in zip(outputs[1:], gradients[1:], strict=True):
        assert torch.equal(output, outputs[0])
        torch.testing.assert_close(grad_gate, gradients[0][2])
        for grad, plain in ((grad_a, gradients[0][0]), (grad_b, gradients[0][1])):
            assert (grad - plain).abs().max() > 0.05 * plain.abs().max()


@pytest.mark.parametrize(("correction", "power"), [("engineering", 0.5), ("theoretical", 1.0)])
def test_one_tokens_expert_gradient_is_divided_by_its_gate(correction, power):
    """With one token there is one g: the theoretical correction is the plain gradient over g."""
    plain, corrected = layer(moelora()), layer(moelora(gate_correction=correction))
    x = inputs(1)
    for made in (plain, corrected):
        made(x).square().sum().backward()
    gates = gates_of(x[0], adapter(plain)["moelora_gate"], 2)
    for i, g in enumerate(gates):
        for name in ("moelora_A", "moelora_B"):
            got, want = adapter(corrected)[name].grad[i], adapter(plain)[name].grad[i]
            if g is None:
                assert not got.any() and not want.any()
            else:
                torch.testing.assert_close(got, want / g.detach() ** power)


def test_start():
    """B is zero, so the output is the base layer's; A and the gate are U(-1, 1) / sqrt(fan-in)."""
    made = MoeLoraLinear(nn.Linear(400, 30), moelora(r=50, num_experts=20))
    x = torch.randn(3, 400)
    assert torch.equal(made(x), made.base_layer(x))
    weights = adapter(made)
    assert not weights["moelora_B"].any()
    for name in ("moelora_A", "moelora_gate"):
        assert weights[name].abs().max() <= 1 / math.sqrt(400)
        assert weights[name].std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.02)


def test_dropout_spares_the_gate():
    made = layer(moelora(lora_dropout=0.5)).train()
    x = inputs(4)
    torch.manual_seed(3)
    got = made(x)
    torch.manual_seed(3)
    torch.testing.assert_close(got, formula(made, x, expert_input=F.dropout(x, 0.5)))


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_low_precision_is_as_near_as_its_rounding(correction):
    """Under bfloat16 autocast the error is that of the eager formula in bfloat16, whatever the gate's correction."""
    exact = layer(moelora(gate_correction=correction), 64, 48)
    x = inputs(64, features=64).detach()
    want = exact.delta("default", x)
    low = layer(moelora(gate_correction=correction), 64, 48).float()
    with torch.autocast("cpu", torch.bfloat16):
        got = low.delta("default", x.float())
        weights = adapter(low)
        gates = top_two(low, x.float())
        eager = sum(
            gates[:, i, None] * 1.5 * F.linear(F.linear(x.float(), weights["moelora_A"][i]), weights["moelora_B"][i])
            for i in range(4)
        )
    same = ((gates > 0) == (top_two(exact, x) > 0)).all(-1)  # a near tie may fall either way
    assert same.float().mean() > 0.9
    assert (got - want)[same].abs().max() < 1.5 * (eager - want)[same].abs().max()


def top_two(made, x):
    logits = F.linear(x, adapter(made)["moelora_gate"]).softmax(-1)
    kept, index = logits.topk(2)
    return torch.zeros_like(logits).scatter(-1, index, kept)


def test_merging_is_refused_with_the_reason():
    made = layer(moelora())
    with pytest.raises(NotImplementedError, match="the gates depend on the input"):
        made.merge()
