"""What `ARCHITECTURES` says of each model type, measured on tiny models of it, and the settings that rest on it."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from hycam.adapter.architectures import ARCHITECTURES, fusible_norm, residual_norm, trained_norms
from hycam.adapter.discovery import self_attention_names
from hycam_kernels import norm_project
from tests.adapter.builders import batch, config, gradients, largest_error, layers_of, randomise
from tests.adapter.outcomes import FOUND, by_type, decoder_type
from tests.decoders import MODEL_TYPES, tiny_decoder, tiny_decoder_config

QUICK = [
    "apertus",
    "bamba",
    "gemma",
    "gemma3_text",
    "glm4",
    "gpt_bigcode",
    "gpt_oss",
    "granitemoe",
    "gptj",
    "lfm2",
    "llama4_text",
    "ministral3",
    "nanochat",
    "olmo3",
    "phi4_multimodal",
    "qwen3_5_text",
    "qwen3_moe",
    "smollm3",
    "starcoder2",
]
# a type of model for each type of decoder
BUILT = {
    decoder_type(model_type): model_type for model_type in sorted({*by_type(FOUND)} & {*MODEL_TYPES}, reverse=True)
}


def each(kind=lambda known: True):
    names = [name for name, known in ARCHITECTURES.items() if kind(known)]
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]
    )


def attentions(model):
    """The decoder layers with the name of the attention in each."""
    ends = tuple(f".{name}" for name in self_attention_names(model))
    paths = [name.rpartition(".") for name, _ in model.named_modules() if f".{name}".endswith(ends)]
    return [(model.get_submodule(layer), attention) for layer, _, attention in paths]


@pytest.fixture(autouse=True)
def _a_type_that_this_transformers_has(request):
    if request.node.callspec.params["name"] not in BUILT:
        pytest.skip("transformers got it later")


def working(name):
    """A model in training whose dropout drops and whose multipliers multiply, with norms that have weights."""
    fields = tiny_decoder_config(BUILT[name]).to_dict()
    changes = {field: 0.3 for field in fields if field.endswith(("pdrop", "dropout")) and not field.startswith("att")}
    changes |= {"residual_multiplier": 0.5} if "residual_multiplier" in fields else {}
    model = tiny_decoder(BUILT[name], **changes).train()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def calls(model, layer):
    """First input and output of each of the layer's modules in one forward, by name."""
    seen = {}

    def note(name):
        def hook(module, args, kwargs, output):
            seen.setdefault(name, (args[0] if args else kwargs.get("hidden_states"), output))

        return hook

    for name, module in layer.named_children():
        module.register_forward_hook(note(name), with_kwargs=True)
    model(**batch())
    return seen


def tensors(seen):
    return [given for given, _ in seen.values() if isinstance(given, torch.Tensor)]


@each()
def test_the_residual_stream_and_the_norms(name):
    known, model = ARCHITECTURES[name], working(name)
    for layer, attention in attentions(model):
        seen = calls(model, layer)
        hidden, (h_att, *_) = seen[attention]
        normed = [module for module, (_, output) in seen.items() if output is hidden]
        assert normed == ([] if known.input_norm is None else [known.input_norm])
        h_in = seen[known.input_norm][0] if known.input_norm else hidden
        assert any(torch.equal(given, h_in + h_att) for given in tensors(seen)) == (known.obstacle is None)
        assert all(layer.get_submodule(norm).weight.ndim == 1 for norm in known.norms)
        if not known.norms:
            assert getattr(layer.get_submodule(known.input_norm), "weight", None) is None


@each(lambda known: known.input_norm is not None and known.norms)
def test_the_norm_is_the_one_that_norm_project_computes(name):
    """To the bit in bfloat16, or it isn't fused."""
    known = ARCHITECTURES[name]
    layer, _ = attentions(working(name))[0]
    norm = layer.get_submodule(known.input_norm).to(torch.bfloat16)
    given = torch.randn(64, norm.weight.numel(), dtype=torch.bfloat16) * 3
    weights = torch.zeros(1, 1, given.shape[1]), torch.zeros(1, 1, 1), torch.zeros(1, given.shape[1])
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))
    bias = getattr(norm, "bias", None)
    kind = "layer" if isinstance(norm, nn.LayerNorm) else "rms"
    got = norm_project(given, norm.weight, *weights, norm_bias=bias, eps=eps, kind=kind).hidden
    is_fused = torch.equal(got, norm(given)) and kind == known.norm_kind
    assert is_fused == (known.norm_obstacle is None)


@each(lambda known: known.obstacle is None)
def test_residual_modulation(name):
    model = get_peft_model(tiny_decoder(BUILT[name]), config(modulation="residual", noise="never")).eval()
    randomise(model)
    for path, wrapped in layers_of(model).items():
        inputs, outputs = [], []
        wrapped.register_forward_pre_hook(
            lambda _, args, kwargs, to=inputs: to.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        wrapped.base_layer.register_forward_hook(lambda _, args, output, to=outputs: to.append(output[0]))
        seen = calls(model, model.get_submodule(path.rpartition(".")[0]))
        want = (seen[residual_norm(name)][0] + outputs[0]) * (1 + wrapped.modulation(inputs[0]))
        assert any(torch.allclose(given, want, rtol=1e-4, atol=1e-5) for given in tensors(seen))


@each(lambda known: known.norm_obstacle is None)
def test_fused_norms(name):
    results = []
    for fuse in (False, True):
        torch.manual_seed(1)
        model = get_peft_model(tiny_decoder(BUILT[name]), config(fuse_norm=fuse, noise="never", balance_coef=1.0))
        randomise(model)
        model.train()(**batch()).loss.backward()
        results.append(gradients(model))
    assert fusible_norm(name) == (ARCHITECTURES[name].input_norm, ARCHITECTURES[name].norm_kind)
    want, got = results
    assert largest_error(got, want) < 1e-3


@each(lambda known: known.norms)
def test_trained_norms(name):
    """Those of the layers with an adapter and no others."""
    model = get_peft_model(tiny_decoder(BUILT[name]), config(train_norms=True))
    trained = {path for path, p in model.named_parameters() if p.requires_grad and "hycam_" not in path}
    wanted = {f"{path.rpartition('.')[0]}.{norm}" for path in layers_of(model) for norm in trained_norms(name)}
    assert {path.partition(".modules_to_save")[0] for path in trained} == wanted
    model.train()(**batch()).loss.backward()
    assert all(model.get_parameter(path).grad is not None for path in trained)


@each(lambda known: not known.norms)
def test_norms_without_weights_are_not_trained(name):
    with pytest.raises(ValueError, match=r"train_norms: got True .*, want False: its norm has no weight"):
        get_peft_model(tiny_decoder(BUILT[name]), config(train_norms=True))
