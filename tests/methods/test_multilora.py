"""MultiLoRA against its formula, token by token; merging."""

import math

import pytest
import torch
from peft import get_peft_model
from torch import nn

from hycam.errors import InputError
from hycam.methods import MultiLoraConfig, MultiLoraLinear
from tests.adapter.builders import batch
from tests.methods.builders import adapted_model, adapter, gradients_of, inputs, layer, multilora, randomise
from tests.models import tiny_model


def formula(made, x):
    """y = W x + b + (alpha / r) * sum_i s_i * (B_i A_i x), one token and one product at a time."""
    weights = adapter(made)
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        y = made.base_layer.weight @ token + made.base_layer.bias
        for a, b, s in zip(weights["multilora_A"], weights["multilora_B"], weights["multilora_scale"], strict=True):
            y = y + 6 / 4 * s * (b @ (a @ token))
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("leading", [(2, 3), (5,), (1,), (0,), (2, 0)])
def test_the_formula_and_its_gradients(leading):
    made = layer(multilora())
    x = inputs(*leading)
    got = made(x)
    if x.numel() == 0:
        assert got.shape == (*leading, 6)
        return
    want = formula(made, x)
    torch.testing.assert_close(got, want)
    leaves = [x, *adapter(made).values()]
    upstream = torch.randn_like(want)
    for mine, theirs in zip(gradients_of(got, upstream, leaves), gradients_of(want, upstream, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_start():
    """s is zero, so the output is the base layer's; A and B are U(-1, 1) / sqrt(fan-in) of each product."""
    made = MultiLoraLinear(nn.Linear(400, 300), multilora(r=100))
    x = torch.randn(3, 400)
    assert torch.equal(made(x), made.base_layer(x))
    weights = adapter(made)
    assert not weights["multilora_scale"].any()
    for name, fan_in in (("multilora_A", 400), ("multilora_B", 100)):
        assert weights[name].abs().max() <= 1 / math.sqrt(fan_in)
        assert weights[name].std().item() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.02)


def test_no_scale_without_lora_alpha():
    scaled, plain = layer(multilora(lora_alpha=4)), layer(multilora(lora_alpha=None))
    plain.load_state_dict(scaled.state_dict())
    x = inputs(3)
    assert torch.equal(scaled(x), plain(x))


def test_dropout_is_on_the_products_input_in_training_alone():
    made = layer(multilora(lora_dropout=0.5))
    x = inputs(4)
    base = made.base_layer(x)
    torch.manual_seed(3)
    got = made.train()(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(got - base, formula(made, dropped) - made.base_layer(dropped))
    torch.testing.assert_close(made.eval()(x), formula(made, x))


def test_presets():
    paper, matched = MultiLoraConfig(), MultiLoraConfig.preset("budget_matched")
    assert (paper.num_adapters, paper.r) == (5, 64)
    assert paper.to_dict() == MultiLoraConfig.preset("paper").to_dict()
    assert matched.num_adapters * matched.r == 64
    assert MultiLoraConfig.preset("budget_matched", r=8, num_adapters=8).num_adapters == 8
    with pytest.raises(InputError, match="preset: got 'small', want one of paper, budget_matched"):
        MultiLoraConfig.preset("small")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload_is_the_adapted_model(family, safe_merge):
    """In float64, to its rounding: GPT-2's layers hold their weight transposed."""
    model = adapted_model(multilora(), family=family, dtype=torch.float64).eval()
    want = model(**batch()).logits
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not any(isinstance(module, MultiLoraLinear) for module in merged.modules())
    assert merged.state_dict().keys() == tiny_model(family).state_dict().keys()
    torch.testing.assert_close(merged(**batch()).logits, want, rtol=1e-11, atol=1e-11)


def test_merge_and_unmerge():
    model = adapted_model(multilora(), dtype=torch.float64).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}
    want = model(**batch()).logits
    model.merge_adapter()
    assert any((p - before[name]).abs().max() > 1e-3 for name, p in model.named_parameters() if name in before)
    torch.testing.assert_close(model(**batch()).logits, want, rtol=1e-11, atol=1e-11)
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        if name in before:
            torch.testing.assert_close(parameter, before[name], rtol=0, atol=1e-15)
    torch.testing.assert_close(model(**batch()).logits, want, rtol=1e-11, atol=1e-11)


def test_a_merged_weight_is_rounded_once():
    """In bfloat16 the sum is made in float32: nearer than the sum of rounded terms can be."""
    model = adapted_model(multilora(), dtype=torch.bfloat16).eval()
    made = model.base_model.model.model.layers[0].self_attn.q_proj
    want = (made.base_layer.weight.double() + made.get_delta_weight("default").double()).bfloat16()
    made.merge()
    assert torch.equal(made.base_layer.weight, want)


def test_disabling_a_merged_adapter_unmerges_it():
    model = adapted_model(multilora(), dtype=torch.float64).eval()
    base = tiny_model(dtype=torch.float64)(**batch()).logits
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch()).logits, base, rtol=1e-11, atol=1e-11)


def test_two_adapters_merge_to_their_sum():
    model = adapted_model(multilora(), dtype=torch.float64)
    model.add_adapter("other", multilora(r=2, num_adapters=1))
    model.set_adapter("other")
    randomise(model, seed=9, scale=0.1)
    model.base_model.set_adapter(["default", "other"])
    want = model.eval()(**batch()).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch()).logits, want, rtol=1e-11, atol=1e-11)


def test_a_weight_that_is_not_finite_is_not_merged():
    made = layer(multilora())
    before = made.base_layer.weight.clone()
    with torch.no_grad():
        adapter(made)["multilora_scale"].fill_(float("inf"))
    with pytest.raises(ValueError, match="adapter 'default': the merged weight is not finite"):
        made.merge(safe_merge=True)
    assert torch.equal(made.base_layer.weight, before)


def test_a_quantised_weight_is_not_merged():
    made = layer(multilora())
    made.base_layer.weight = nn.Parameter(torch.zeros(6, 7, dtype=torch.int8), requires_grad=False)
    with pytest.raises(NotImplementedError, match=r"weight is torch.int8, want a float weight"):
        made.merge()


def test_a_model_that_has_an_adapter_takes_another_all_linear():
    model = get_peft_model(tiny_model(), multilora())
    model.add_adapter("other", multilora(num_adapters=2))
    for module in model.modules():
        if isinstance(module, MultiLoraLinear):
            assert not isinstance(module.base_layer, MultiLoraLinear)
            assert set(module.multilora_A) == {"default", "other"}
