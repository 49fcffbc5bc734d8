"""One wrapped attention: its parameters, its equations in every form, and what it refuses."""

import copy
import math
import warnings

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import hycam
from hycam import HyCAMAttention, HyCAMConfig, router_statistics
from hycam_kernels.reference import modulation_reference
from tests.adapter.builders import adapted_model, batch, by_saved_name, config, gradients, layers_of, randomise
from tests.models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:HyCAM layers run without hycam.bind")

D = 16


class Attention(nn.Module):
    """An attention stub: what it returns is known, and differs from its input."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.projection = nn.Linear(D, D, dtype=dtype)
        self.head_dim = 4

    def forward(self, hidden_states, attention_mask=None):
        return self.projection(hidden_states), "weights"


def wrapped(dtype=torch.float32, training=False, **settings):
    torch.manual_seed(0)
    layer = HyCAMAttention(Attention(dtype).train(training), config(**settings), hidden_size=D)
    randomise(layer)
    return layer


def reference(layer, hidden, **options):
    """The layer by the equations alone, from its parameters."""
    named = {name.removeprefix("hycam_"): p for name, p in by_saved_name(layer.named_parameters()).items()}
    shared = named.get("shared.weight")
    if "shared_lora_a" in named:
        shared = named["shared_lora_b"] @ named["shared_lora_n"] @ named["shared_lora_a"]
    attn_output = layer.base_layer(hidden)[0]
    return modulation_reference(
        hidden,
        attn_output,
        shared,
        *(named.get(name) for name in ("lora_a", "lora_n", "lora_b", "router.weight")),
        shared_bias=named.get("shared.bias"),
        router_bias=named.get("router.bias"),
        **{name: named.get(name) for name in ("lora_a_bias", "lora_n_bias", "lora_b_bias", "expert_weight")},
        **options,
    )


FORMS = [
    {},
    {"bias": True, "lora_alpha": 8.0},
    {"routing": "hard", "tau": 0.7},
    {"recompute": True},
    {"experts": "full", "bias": True},
    {"experts": "none", "bias": True},
    {"shared": "slora", "bias": True},
    {"shared": "none"},
    {"shared": "slora", "experts": "full"},
    {"shared": "slora", "experts": "none"},
]


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_every_form_is_its_equations(settings):
    layer = wrapped(**settings)
    hidden = torch.randn(2, 5, D, requires_grad=True)
    got, weights = layer(hidden_states=hidden)
    assert weights == "weights"
    options = {
        "tau": settings.get("tau", 0.5),
        "hard": settings.get("routing") == "hard",
        "scale": layer.adapter_configs["default"].scale,
    }
    want = reference(layer, hidden, **options)
    torch.testing.assert_close(got, want.hidden_states)
    parameters = [hidden, *layer.adapter_parameters()]
    cotangent = torch.randn_like(got)
    for one, other in zip(
        torch.autograd.grad(got, parameters, cotangent, allow_unused=True),
        torch.autograd.grad(want.hidden_states, parameters, cotangent, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    if settings.get("experts") != "none":
        kept = router_statistics(nn.ModuleDict({"a": layer}))["a"]
        torch.testing.assert_close(kept.load, want.load.detach())
        torch.testing.assert_close(kept.balance_loss, want.balance_loss.detach())
        assert kept.tokens == 10


def test_recompute_keeps_less_for_the_backward_pass():
    kept = {}
    for recompute in (False, True):
        layer, hidden = wrapped(recompute=recompute), torch.randn(2, 50, D)
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda _: None):
            layer(hidden)
        kept[recompute] = sum(sizes)
    assert kept[False] - kept[True] == 100 * (D + 3 * 4), "S [tokens, d] and V [tokens, experts * rank]"


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_modulation_is_a_fusion_without_noise(settings):
    layer = wrapped(**({"noise": "always"} | settings))
    hidden = torch.randn(2, 5, D)
    fusion = layer.modulation(hidden)
    layer.adapter_configs["default"].noise = "never"
    got, attn_output = layer(hidden)[0], layer.base_layer(hidden)[0]
    torch.testing.assert_close(attn_output * (1 + fusion), got)
    with pytest.raises(ValueError, match="adapter_name: got 'other', want one of default"):
        layer.modulation(hidden, "other")


def names(layer):
    return sorted(name for name in layer.state_dict() if "hycam" in name)


def test_state_names_and_shapes():
    shapes = {name: tuple(value.shape) for name, value in wrapped(bias=True).state_dict().items() if "hycam" in name}
    assert shapes == {
        "hycam_shared.default.weight": (D, D),
        "hycam_shared.default.bias": (D,),
        "hycam_router.default.weight": (3, D),
        "hycam_router.default.bias": (3,),
        "hycam_lora_a.default.weight": (3, 4, D),
        "hycam_lora_n.default.weight": (3, 4, 4),
        "hycam_lora_b.default.weight": (3, D, 4),
        "hycam_lora_a_bias.default.weight": (3, 4),
        "hycam_lora_n_bias.default.weight": (3, 4),
        "hycam_lora_b_bias.default.weight": (3, D),
    }
    assert names(wrapped(shared="slora", experts="full")) == [
        "hycam_expert_weight.default.weight",
        "hycam_router.default.weight",
        "hycam_shared_lora_a.default.weight",
        "hycam_shared_lora_b.default.weight",
        "hycam_shared_lora_n.default.weight",
    ]
    assert names(wrapped(experts="none")) == ["hycam_shared.default.weight"]


def test_start_values():
    torch.manual_seed(0)
    d, r = 512, 64
    layer = HyCAMAttention(Attention(), config(r=r, num_experts=4, bias=True), hidden_size=d)
    state = layer.state_dict()
    for name in ("hycam_shared.default.weight", "hycam_lora_b.default.weight", "hycam_router.default.bias"):
        assert not state[name].any()
    for name, fan_in in (("hycam_lora_a.default.weight", d), ("hycam_lora_n.default.weight", r)):
        for expert in state[name]:
            bound = 1 / math.sqrt(fan_in)
            assert expert.abs().max() <= bound
            assert expert.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert state["hycam_router.default.weight"].std() == pytest.approx(0.02, rel=0.1)
    layer = HyCAMAttention(Attention(), config(r=r, shared="slora", experts="full"), hidden_size=d)
    assert not layer.state_dict()["hycam_expert_weight.default.weight"].any()
    assert not layer.state_dict()["hycam_shared_lora_b.default.weight"].any()
    assert layer.state_dict()["hycam_shared_lora_a.default.weight"].std() == pytest.approx(
        1 / math.sqrt(3 * d), rel=0.05
    )


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_the_start_is_the_attention_itself(settings):
    attention = Attention()
    layer = HyCAMAttention(attention, config(noise="always", **settings), hidden_size=D)
    hidden = torch.randn(2, 5, D)
    assert torch.equal(layer(hidden)[0], attention(hidden)[0])


def test_it_takes_after_the_attention():
    attention = Attention(torch.bfloat16).eval()
    layer = HyCAMAttention(attention, config(), hidden_size=D)
    assert {p.dtype for p in layer.adapter_parameters()} == {torch.bfloat16}
    assert not any(module.training for module in layer.modules())
    assert not any(p.requires_grad for p in attention.parameters())
    assert all(p.requires_grad for p in layer.adapter_parameters())
    assert layer.head_dim == 4
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = layer.nothing
    assert HyCAMAttention(Attention().train(), config(), hidden_size=D).training
    meta = HyCAMAttention(Attention().to("meta"), config(), hidden_size=D)
    assert {p.device.type for p in meta.adapter_parameters()} == {"meta"}


def test_float32_adapters_on_a_bfloat16_backbone():
    model = adapted_model(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    output = model(**batch())
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}


def test_autocast():
    model = adapted_model(noise="never", shared="slora")
    with torch.no_grad():
        want = model(**batch()).logits
        with torch.autocast("cpu", torch.bfloat16):
            got = model(**batch()).logits
    assert 0 < (got - want).abs().max() < 0.05 * want.abs().max()


def test_hidden_size_comes_from_the_configuration():
    attention = tiny_model().model.layers[0].self_attn
    assert HyCAMAttention(attention, config()).hidden_size == 32
    with pytest.raises(ValueError, match="hidden_size: got none for Attention"):
        HyCAMAttention(Attention(), config())


class Returns(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, hidden):
        return self.output(hidden)


@pytest.mark.parametrize("output", [lambda h: h, lambda h: (), lambda h: (h[..., :3], None), lambda h: [h, None]])
def test_what_is_no_attention_is_refused(output):
    layer = HyCAMAttention(Returns(output), config(), hidden_size=D)
    with pytest.raises(TypeError, match=r"HyCAM wraps self-attention: Returns .*want a tuple"):
        layer(torch.randn(2, 5, D))


def test_noise_follows_its_setting():
    for noise, training, is_noisy in (
        ("train", True, True),
        ("train", False, False),
        ("always", False, True),
        ("never", True, False),
    ):
        layer = wrapped(noise=noise, training=training, balance_coef=0.0)
        hidden = torch.randn(2, 5, D)
        assert torch.equal(layer(hidden)[0], layer(hidden)[0]) != is_noisy


def test_merge_is_refused():
    with pytest.raises(NotImplementedError, match="depends on the input"):
        wrapped().merge()


def by_hand(**settings):
    """The README's way: every attention of a model wrapped in a loop."""
    model = tiny_model().train()
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.self_attn = HyCAMAttention(layer.self_attn, config(noise="never", **settings), hidden_size=32)
    randomise(model)
    return model


def test_by_hand_unbound_warns_once_and_counts_the_configurations_layers():
    model, inputs = by_hand(), batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(**inputs)
    assert sum("hycam.bind" in str(warning.message) for warning in caught) == 1
    assert all(kept.tokens == 27 for kept in router_statistics(model).values())

    bound = by_hand()
    hycam.bind(bound)
    inputs.pop("attention_mask")
    for one in (model, bound):
        one(**inputs).loss.backward()
    for (name, one), (_, other) in zip(model.named_parameters(), bound.named_parameters(), strict=True):
        if "hycam_" in name:
            torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("settings", [{"balance_scope": "model"}, {"modulation": "residual"}, {"train_norms": True}])
def test_by_hand_what_needs_the_model_needs_bind(settings):
    model = by_hand(**settings)
    with pytest.raises(RuntimeError, match=r"hycam.bind\(model\)"):
        model(**batch())
    hycam.bind(model)
    model(**batch()).loss.backward()


def test_bind_freezes_the_rest():
    model = by_hand(train_norms=True)
    assert model.lm_head.weight.requires_grad
    assert hycam.bind(model) is model
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "hycam_" not in name}
    assert trained == {
        f"model.layers.{i}.{norm}.weight" for i in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")
    }
    free = by_hand()
    hycam.bind(free, freeze=False)
    assert free.lm_head.weight.requires_grad
    with pytest.raises(ValueError, match="model: got LlamaForCausalLM without a HyCAMAttention"):
        hycam.bind(tiny_model())


def test_bind_twice_is_bind_once():
    model = by_hand(balance_coef=1.0)
    hycam.bind(model)
    model(**batch()).loss.backward()
    want = gradients(model)
    hycam.bind(model)
    assert len(model._forward_hooks) == 1
    model(**batch()).loss.backward()
    assert all(torch.equal(got, want[name]) for name, got in gradients(model).items())


def test_by_hand_state_goes_through_a_file(tmp_path):
    model = by_hand()
    hycam.bind(model)
    state = {name: value for name, value in model.state_dict().items() if ".hycam_" in name}
    save_file(state, tmp_path / "hycam.safetensors")
    other = tiny_model()
    for layer in other.model.layers:
        layer.self_attn = HyCAMAttention(layer.self_attn, config(), hidden_size=32)
    missing, unexpected = other.load_state_dict(load_file(tmp_path / "hycam.safetensors"), strict=False)
    assert not unexpected
    assert not [name for name in missing if "hycam" in name]
    assert torch.equal(other(**batch()).logits, model.eval()(**batch()).logits)


def test_deep_copies_are_their_own():
    model = adapted_model(modulation="residual", balance_coef=1.0, noise="never")
    model(**batch())
    other = copy.deepcopy(model)
    binding = other.get_base_model().hycam_binding
    assert layers_of(other).keys() == layers_of(model).keys()
    for name, layer in layers_of(other).items():
        assert layer.calls is binding.calls
        assert layer.calls is not layers_of(model)[name].calls
        assert binding.layers[layer.layer_name] is layer
    other(**batch()).loss.backward()
    want = gradients(other)
    model(**batch()).loss.backward()
    assert all(torch.equal(got, want[name]) for name, got in gradients(model).items())


def test_residual_modulation_is_the_released_layer():
    """(h_in + h_att)(1 + A), then the MLP: the decoder layer written out."""
    model = adapted_model(modulation="residual", noise="never").eval().get_base_model()
    block, hidden = model.model.layers[0], torch.randn(2, 5, 32)
    positions = model.model.rotary_emb(hidden, torch.arange(5)[None])
    got = block(hidden, position_embeddings=positions)
    h = block.input_layernorm(hidden)
    h_att = block.self_attn.base_layer(h, position_embeddings=positions, attention_mask=None)[0]
    stream = (hidden + h_att) * (1 + block.self_attn.modulation(h))
    want = stream + block.mlp(block.post_attention_layernorm(stream))
    torch.testing.assert_close(got, want)


def test_released_code_preset_trains():
    model = get_peft_model(tiny_model(), HyCAMConfig.preset("released_code", r=4, num_experts=3))
    randomise(model)
    model.train()(**batch()).loss.backward()
    trained = gradients(model)
    assert sum("layernorm" in name for name in trained) == 4
    assert not any("router" in name for name in trained)
    assert all(gradient.any() for gradient in trained.values())
    model.eval()
    assert not torch.equal(model(**batch()).logits, model(**batch()).logits)
