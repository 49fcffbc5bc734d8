"""The rule by which HyCAM finds a decoder's self-attentions, on modules that have the form and not much else."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import GPT2Config, LlamaConfig

from hycam.adapter.discovery import self_attention_names
from tests.adapter.builders import config, layers_of
from tests.models import tiny_model


class Attention(nn.Module):
    head_dim = 2

    def __init__(self, size=4):
        super().__init__()
        self.o_proj = nn.Linear(size, 4)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        return self.o_proj(hidden_states), None


class Mixer(Attention):
    """A recurrent one: its state isn't keys and values."""

    def forward(self, hidden_states, attention_mask=None, cache_params=None):
        return self.o_proj(hidden_states), None


class AttentionWithCache(Attention):
    """As transformers 5.24 names the argument."""

    def forward(self, hidden_states, attention_mask=None, cache=None):
        return self.o_proj(hidden_states), None


class ConvolvedKeys(AttentionWithCache):
    """Not a mixer: it convolves what it projects, in a module of its own."""

    def __init__(self):
        super().__init__()
        self.k_norm = nn.Sequential(nn.Conv1d(4, 4, 2))


class MixerWithCache(AttentionWithCache):
    """The state of a recurrent one has the same name there."""

    def __init__(self):
        super().__init__()
        self.conv1d = nn.Conv1d(4, 4, 2)


class Sum(Attention):
    def forward(self, hidden_states, residual, attention_mask=None, past_key_values=None):
        return residual + self.o_proj(hidden_states), None


class Bare(Attention):
    def forward(self, hidden_states, attention_mask=None, past_key_values=None) -> torch.Tensor:
        return self.o_proj(hidden_states)


class Output(nn.Module):
    def forward(self, hidden_states, input_tensor):
        return hidden_states + input_tensor


class Layer(nn.Module):
    """A decoder layer that has heads of its own, and takes all that its attention takes."""

    num_heads = 2

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        return (hidden_states,)


class Decoder(nn.Module):
    def __init__(self, *layers, **modules):
        super().__init__()
        self.config = LlamaConfig(hidden_size=4, num_attention_heads=2)
        self.model = Layer(layers=nn.ModuleList(layers), **modules)


def named(model, config):
    """Every attention of `model` with a configuration of its own."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.config = config
    return model


FOUND = {
    "each-layer": ([Layer(attention=Attention(), mlp=nn.Linear(4, 4)) for _ in range(3)], {"attention"}),
    "no-cross-attention": ([Layer(attn=Attention(), cross_attn=Attention(), encoder_attn=Attention())], {"attn"}),
    "a-hybrid": ([Layer(mixer=Mixer()), Layer(mixer=Attention())], {"1.mixer"}),
    "caches-of-one-name": ([Layer(mixer=MixerWithCache()), Layer(mixer=AttentionWithCache())], {"1.mixer"}),
    "convolved-keys": ([Layer(attn=ConvolvedKeys())], {"attn"}),
    "eleven-and-one": (
        [Layer(mixer=Attention() if i in (1, 11) else Mixer()) for i in range(12)],
        {"1.mixer", "11.mixer"},
    ),
    "another-name-inside": ([Layer(attn=Layer(attention=Attention()))], {"attention"}),
    "two-in-a-layer": ([Layer(attn=nn.ModuleList([Attention(), Attention()]))], {"attn.0", "attn.1"}),
    "an-mlp-that-adds": ([Layer(attn=Attention(), mlp=Output())], {"attn"}),
    "another-model-inside": ([Layer(attn=Attention())], {"model.layers.0.attn"}),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_attentions_are_found_by_what_they_are(name):
    layers, want = FOUND[name]
    model = Decoder(*layers)
    if name == "another-model-inside":
        model.tower = named(Layer(layers=nn.ModuleList([Layer(attn=Attention())])), GPT2Config())
    assert self_attention_names(model) == want


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([Layer(mixer=Mixer())], "it has no module with heads that takes"),
        ([Layer(mixer=MixerWithCache())], "it has no module with heads that takes"),
        ([Layer(attn=Bare())], "it has no module with heads that takes"),
        ([Layer(attn=Sum())], "model.layers.0.attn, a Sum, has the residual stream added to its output"),
        (
            [Layer(attn=Layer(inner=Attention(), output=Output()))],
            "model.layers.0.attn.inner, a Attention, has the residual stream",
        ),
        ([Layer(attn=Attention(8))], "model.layers.0.attn, a Attention, takes 8 features where the model has 4"),
        (
            [Layer(attn=module) for module in [Attention()] * 2],
            "model.layers.0.attn, a Attention, is shared by several layers",
        ),
        ([named(Layer(attn=Attention()), GPT2Config())], r"those it has belong to the models inside it \(gpt2\)"),
    ],
)
def test_what_cannot_be_wrapped_is_refused_with_the_reason(layers, reason):
    with pytest.raises(ValueError, match=rf"^target_modules: got none for Decoder \(model_type 'llama'\).*: {reason}"):
        self_attention_names(Decoder(*layers))


def test_the_same_names_for_an_adapted_model_and_a_choice_of_layers():
    model = get_peft_model(tiny_model(), config(layers_to_transform=[0]))
    assert self_attention_names(model.get_base_model()) == {"self_attn"}
    model.add_adapter("other", config(layers_to_transform=[1]))
    assert [list(layer.adapter_configs) for layer in layers_of(model).values()] == [["default"], ["other"]]


def test_a_model_without_a_configuration():
    model = Decoder(Layer(attn=Attention()))
    del model.config
    assert self_attention_names(model) == {"attn"}


def test_names_that_are_whole_paths():
    model = Decoder(*(Layer(attn=Attention()) for _ in range(3)))
    model.tower = named(Layer(layers=nn.ModuleList(Layer(attn=Attention()) for _ in range(3))), GPT2Config())
    assert self_attention_names(model) == {f"model.layers.{index}.attn" for index in range(3)}
    assert self_attention_names(model, [2]) == {"model.layers.2.attn"}, "PEFT takes a whole path whatever its index"


def test_whole_paths_that_end_others():
    model = Decoder()
    model.layers = nn.ModuleList([Layer(attn=Attention())])
    model.tower = named(Layer(layers=nn.ModuleList([Layer(attn=Attention())])), GPT2Config())
    with pytest.raises(ValueError, match=r"the names of those it has, layers.0.attn the first, are others' too"):
        self_attention_names(model)
