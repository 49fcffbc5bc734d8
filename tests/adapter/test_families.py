"""The architectures: where HyCAM goes by itself, where its user names the target, and what it can do there."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from hycam import HyCAMAttention, HyCAMConfig, router_statistics
from tests.adapter.builders import FAMILIES, adapted_model, batch, config, layers_of
from tests.models import tiny_model

PLAIN_RESIDUAL = ["llama", "mistral", "qwen2", "qwen3", "gpt2"]


def generate(model, **kwargs):
    ids = torch.randint(3, 128, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | kwargs
    return model.generate(input_ids=ids, attention_mask=mask, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_is_the_base_model_and_disabling_goes_back_to_it(family):
    base = tiny_model(family)
    inputs = batch()
    want, text = base(**inputs).logits, generate(base)
    model = get_peft_model(base, config())
    assert not any(module.training for module in model.base_model.modules() if module is not model.base_model)
    model.eval()
    assert torch.equal(model(**inputs).logits, want)
    assert torch.equal(generate(model), text)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    assert not torch.equal(model(**inputs).logits, want)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, want)
        assert torch.equal(generate(model), text)
    assert torch.equal(model.unload()(**inputs).logits, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_equals_the_full_forward(family):
    model = adapted_model(family).eval()
    want = generate(model, use_cache=False)
    assert torch.equal(generate(model), want)
    logits = model(**batch()).logits
    with model.disable_adapter():
        assert not torch.allclose(model(**batch()).logits, logits), "the adapter changes too little to tell"


def test_generation_with_a_static_cache():
    model = adapted_model().eval()
    assert torch.equal(generate(model, cache_implementation="static"), generate(model, use_cache=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_repeats_training_does_not(family):
    model = adapted_model(family).eval()
    inputs = batch()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_and_attention_outputs(implementation):
    model, counted = adapted_model().eval(), batch()["attention_mask"].bool()
    want = model(**batch()).logits
    model.get_base_model().set_attn_implementation(implementation)
    torch.testing.assert_close(model(**batch()).logits[counted], want[counted])
    model.get_base_model().set_attn_implementation("eager")
    output = model(**batch(), output_attentions=True, output_hidden_states=True)
    assert [tuple(attention.shape) for attention in output.attentions] == [(3, 4, 9, 9)] * 2
    assert len(output.hidden_states) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_modulation(family):
    """Where the residual is plain, scaling the whole stream by (1 + A); refused, with the reason, elsewhere."""
    settings = {"modulation": "residual", "noise": "never"}
    if family not in PLAIN_RESIDUAL:
        base = tiny_model(family)
        with pytest.raises(
            ValueError, match=rf"modulation: got 'residual' for model_type '{family}'.* layer (puts|multi)"
        ):
            get_peft_model(base, config(**settings))
        assert not layers_of(base), "a refused model is left as it was"
        return
    model = adapted_model(family, **settings).eval()
    seen = {}
    (name, layer), *_ = layers_of(model).items()
    block = model.get_submodule(name.rpartition(".")[0])
    norm = {"gpt2": ("ln_1", "ln_2")}.get(family, ("input_layernorm", "post_attention_layernorm"))

    def note(key):
        return lambda module, args, *_: seen.__setitem__(key, args[0])

    block.get_submodule(norm[0]).register_forward_pre_hook(note("h_in"))
    block.get_submodule(norm[1]).register_forward_pre_hook(note("stream"))
    layer.base_layer.register_forward_hook(lambda m, a, k, out: seen.__setitem__("h_att", out[0]), with_kwargs=True)
    layer.register_forward_pre_hook(
        lambda m, a, k: seen.__setitem__("h", k["hidden_states"] if "hidden_states" in k else a[0]), with_kwargs=True
    )
    model(**batch())
    want = (seen["h_in"] + seen["h_att"]) * (1 + layer.modulation(seen["h"]))
    torch.testing.assert_close(seen["stream"], want)


def test_an_unknown_model_is_refused():
    with pytest.raises(
        ValueError, match=r"target_modules: got none for Linear .*: it has no module with heads that takes"
    ):
        get_peft_model(nn.Linear(4, 4), HyCAMConfig())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["attention"], "matches no module of LlamaForCausalLM"),
        (["q_proj"], "matching model.layers.0.self_attn.q_proj, a Linear"),
        (["self_attn", "mlp"], "matching model.layers.0.mlp, a LlamaMLP"),
        (["input_layernorm"], "a LlamaRMSNorm"),
        ("all-linear", "matches no module"),
    ],
)
def test_a_target_that_is_no_attention_is_refused_before_anything_changes(targets, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=rf"^target_modules: got .*{message}"):
        get_peft_model(model, config(target_modules=targets))
    assert not layers_of(model)


def test_a_decoder_layer_as_target_is_refused_when_it_runs():
    model = get_peft_model(tiny_model(), config(target_modules=["layers.0"]))
    with pytest.raises(TypeError, match=r"LlamaDecoderLayer model.layers.0 returned Tensor, want a tuple"):
        model(**batch())


@pytest.mark.parametrize(
    ("settings", "adapted"),
    [
        ({"layers_to_transform": 1}, [1]),
        ({"layers_to_transform": [0]}, [0]),
        ({"layers_to_transform": [0, 1]}, [0, 1]),
        ({"target_modules": r".*\.1\.self_attn"}, [1]),
        ({"target_modules": ["layers.0.self_attn"]}, [0]),
    ],
)
def test_choice_of_layers(settings, adapted):
    model = get_peft_model(tiny_model(), config(**settings))
    assert [isinstance(layer.self_attn, HyCAMAttention) for layer in model.model.model.layers] == [
        i in adapted for i in (0, 1)
    ]
    model(**batch())
    assert len(router_statistics(model)) == len(adapted)


def test_layers_that_do_not_exist():
    with pytest.raises(ValueError, match=r"layers_to_transform: got \[2, 7\]"):
        get_peft_model(tiny_model(), config(layers_to_transform=[0, 2, 7]))
    with pytest.raises(ValueError, match=r"layers_to_transform=9, which matches no module"):
        get_peft_model(tiny_model(), config(layers_to_transform=9))


@pytest.mark.parametrize(
    ("family", "norms"),
    [
        ("llama", ["input_layernorm", "post_attention_layernorm"]),
        ("olmo2", ["post_attention_layernorm"]),
        ("gpt2", ["ln_1", "ln_2"]),
    ],
)
@pytest.mark.parametrize("layers", [None, [1]])
def test_trained_norms(family, norms, layers):
    model = get_peft_model(tiny_model(family), config(train_norms=True, layers_to_transform=layers))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "hycam_" not in name}
    path = "transformer.h" if family == "gpt2" else "model.layers"
    wanted = {f"base_model.model.{path}.{index}.{norm}" for index in layers or (0, 1) for norm in norms}
    assert {name.partition(".modules_to_save")[0] for name in trained} == wanted


def test_trainable_size_of_the_papers_settings_on_llama_2_7b():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig())  # its defaults are Llama-2-7B
    model = get_peft_model(model, HyCAMConfig.preset("paper"))
    layers, d, r, experts = 32, 4096, 64, 5
    parts = {
        "shared": layers * d * d,
        "lora": layers * experts * (2 * d * r + r * r),
        "router": layers * experts * d,
    }
    counted = dict.fromkeys(parts, 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counted[next(part for part in parts if f"hycam_{part}" in name)] += parameter.numel()
    assert counted == parts
    trainable, _ = model.get_nb_trainable_parameters()
    assert round(trainable / 1e6) == 622
