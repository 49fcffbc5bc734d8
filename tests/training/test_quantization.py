"""HyCAM on quantised backbones: loaded, trained, saved, loaded again. Each test needs the library that quantises."""

import importlib.util
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from hycam import HyCAMAttention
from hycam.commands.selection import select
from hycam.errors import InputError
from hycam.training.backbone import check_available, load_model
from hycam.training.prepare import adapted_backbone
from hycam.training.recipe import BackboneConfig, load_recipe, parse_recipe
from hycam.training.run import train
from hycam.training.trained import load_selected_model, load_selected_tokenizer
from tests.adapter.builders import by_saved_name
from tests.models import tiny_model
from tests.training.runs import recipe_values, save_backbone, save_recipe

PACKAGES = {"bnb": "bitsandbytes", "torchao": "torchao"}
KINDS = ["bnb-8bit", "bnb-4bit", "torchao-int8", "torchao-float8"]


def needs(kind):
    package = PACKAGES[kind.partition("-")[0]]
    missing = importlib.util.find_spec(package) is None
    return pytest.param(kind, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed"))


@pytest.fixture(scope="module")
def wide_backbone(tmp_path_factory):
    # bitsandbytes quantises in blocks of 64
    return save_backbone(tmp_path_factory.mktemp("backbone"), hidden_size=64)


def linear_weights(model):
    return [layer.self_attn.base_layer.q_proj.weight for layer in model.get_base_model().model.layers]


@pytest.mark.parametrize("kind", [needs(kind) for kind in KINDS])
def test_a_run_on_a_quantised_backbone(tmp_path, wide_backbone, kind):
    values = recipe_values(tmp_path, wide_backbone, backbone={"quantization": kind, "dtype": "bfloat16"})
    recipe = load_recipe(str(save_recipe(tmp_path, values)))
    results = train(recipe)
    run = tmp_path / "run"
    assert results["test"]["adapted"]["overall"]["nll"] < results["test"]["base"]["overall"]["nll"]
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert all(".self_attn.hycam_" in name for name in saved)
    assert max(tensor.abs().max() for name, tensor in saved.items() if "hycam_shared" in name) > 0
    options = Namespace(recipe=str(run), adapter=None, base=False, overrides=[])
    model = load_selected_model(select(options), *load_selected_tokenizer(select(options)))
    assert isinstance(model, PeftModel)
    loaded = by_saved_name((name, p) for name, p in model.named_parameters() if "hycam_" in name)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


@pytest.mark.parametrize("kind", [needs(kind) for kind in KINDS])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_and_dtypes(wide_backbone, kind, checkpointing):
    values = {
        "backbone": {"name_or_path": str(wide_backbone), "quantization": kind, "dtype": "float32"},
        "method": {"r": 4, "num_experts": 2, "noise": "never"},
    }
    recipe = parse_recipe(values, "test")
    plain = parse_recipe(values | {"backbone": {"name_or_path": str(wide_backbone), "dtype": "float32"}}, "test")
    gradients = {}
    for name, wanted in (("quantised", recipe), ("plain", plain)):
        torch.manual_seed(0)
        model = adapted_backbone(wanted, str(wide_backbone)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        ids = torch.arange(24).view(2, 12)
        model(input_ids=ids, labels=ids).loss.backward()
        trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
        assert {p.dtype for p in trained.values()} == {torch.float32}
        assert {p.device.type for p in trained.values()} == {"cpu"}
        gradients[name] = torch.cat([p.grad.flatten() for p in trained.values() if p.grad is not None])
        if name == "quantised":
            assert not any(weight.requires_grad for weight in linear_weights(model))
            assert {type(weight) for weight in linear_weights(model)} != {torch.nn.Parameter}
    # quantised weights give nearly the gradients of those that they stand for
    similarity = torch.nn.functional.cosine_similarity(gradients["quantised"], gradients["plain"], dim=0)
    assert similarity > (0.8 if kind == "bnb-4bit" else 0.98)
    assert not torch.equal(gradients["quantised"], gradients["plain"])


def test_adapters_beside_integer_weights_have_the_models_dtype():
    attention = tiny_model(dtype=torch.bfloat16).model.layers[0].self_attn
    attention.config.dtype = torch.bfloat16
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
        projection.weight = torch.nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    from hycam import HyCAMConfig

    wrapped = HyCAMAttention(attention, HyCAMConfig(r=4, num_experts=2))
    assert {p.dtype for p in wrapped.adapter_parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_library_is_named(monkeypatch, kind):
    package = PACKAGES[kind.partition("-")[0]]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(
        InputError, match=rf"backbone.quantization: got {kind}, but {package} is not installed.*quantiz"
    ):
        check_available(BackboneConfig(name_or_path="x", quantization=kind))


def test_without_quantisation_weights_are_plain(wide_backbone: Path) -> None:
    model = load_model(BackboneConfig(name_or_path=str(wide_backbone)), str(wide_backbone))
    assert type(model.model.layers[0].self_attn.q_proj.weight) is torch.nn.Parameter
