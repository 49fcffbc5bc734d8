"""PEFT and transformers carry HyCAM: one test for each promise that rests on their internals."""

import json
import re
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hycam
from hycam import HyCAMAttention, HyCAMConfig, hotswap_adapter, router_statistics
from hycam.adapter.config import HYCAM
from hycam.adapter.registration import register
from hycam.adapter.tuner import HyCAMModel
from tests.adapter.builders import adapted_model, batch, config, gradients, layers_of, randomise
from tests.models import tiny_model
from tests.versions import transformers_takes_this_peft


def logits(model):
    return model.eval()(**batch()).logits.detach()


def parameters(model, adapter="default"):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "hycam_" in n and f".{adapter}" in n}


@pytest.fixture
def saved(tmp_path):
    """A trained adapter in a folder, its backbone in another, and its logits."""
    tiny_model().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config(train_norms=True, bias=True))
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name and parameter.requires_grad:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, logits(model), parameters(model)


def test_register_again_changes_nothing():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING)
    register(HYCAM, HyCAMConfig, HyCAMModel)
    assert (dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING)) == before
    assert before[0]["HYCAM"] is HyCAMConfig


def test_names_in_the_file_and_in_the_model(saved):
    folder, _, live = saved
    state = load_file(folder / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0."
    assert {name.removeprefix(prefix) for name in state if name.startswith(prefix)} == {
        "self_attn.hycam_shared.weight",
        "self_attn.hycam_shared.bias",
        "self_attn.hycam_lora_a",
        "self_attn.hycam_lora_n",
        "self_attn.hycam_lora_b",
        "self_attn.hycam_lora_a_bias",
        "self_attn.hycam_lora_n_bias",
        "self_attn.hycam_lora_b_bias",
        "self_attn.hycam_router.weight",
        "self_attn.hycam_router.bias",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
    assert f"{prefix}self_attn.hycam_lora_a.default.weight" in live
    assert f"{prefix}self_attn.hycam_shared.default.weight" in live
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_reload_is_bit_exact(saved, low_cpu_mem_usage, is_trainable):
    folder, want, weights = saved
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "base"),
        folder / "adapter",
        is_trainable=is_trainable,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    assert any(p.requires_grad for p in model.parameters()) == is_trainable
    assert all(torch.equal(got, weights[name]) for name, got in parameters(model).items())
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_reload_on_a_bfloat16_backbone_keeps_every_bit_and_stays_frozen(saved, low_cpu_mem_usage):
    folder, _, weights = saved
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16),
        folder / "adapter",
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    assert all(torch.equal(got, weights[name]) for name, got in parameters(model).items())
    assert not any(p.requires_grad for p in model.parameters())


def test_auto_model(saved):
    folder, want, _ = saved
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")), want)


def test_without_the_import_peft_stops_and_the_card_says_what_to_do(saved):
    folder, _, _ = saved
    run = subprocess.run(
        [sys.executable, "-c", f"from peft import PeftConfig; PeftConfig.from_pretrained({str(folder / 'adapter')!r})"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "KeyError: 'HYCAM'" in run.stderr
    card = (folder / "adapter" / "README.md").read_text()
    assert "import hycam" in card
    assert "KeyError: 'HYCAM'" in card
    adapted_model().save_pretrained(folder / "adapter")
    assert (folder / "adapter" / "README.md").read_text().count("## Loading this HyCAM adapter") == 1


def test_state_dict_goes_through_pefts_own_functions():
    model, other = adapted_model(), get_peft_model(tiny_model(), config(), adapter_name="other")
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model), adapter_name="other")
    assert not result.unexpected_keys
    assert torch.equal(logits(other), logits(model))


@transformers_takes_this_peft
@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="transformers' loader took no trained norms before"
)
def test_transformers_load_adapter(saved):
    folder, want, _ = saved
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.load_adapter(folder / "adapter")
    assert torch.equal(logits(model), want)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder / "base")))


@transformers_takes_this_peft
def test_transformers_loads_two_adapters(tmp_path):
    trained = [adapted_model(), adapted_model()]
    randomise(trained[1], seed=9)
    model = tiny_model()
    for name, source in zip(("one", "two"), trained, strict=True):
        source.save_pretrained(tmp_path / name)
        model.load_adapter(tmp_path / name, adapter_name=name)
    for name, source in zip(("one", "two"), trained, strict=True):
        model.set_adapter(name)
        assert torch.equal(logits(model), logits(source))
    model.disable_adapters()
    assert torch.equal(logits(model), logits(tiny_model()))
    model.enable_adapters()
    model.delete_adapter("one")
    assert torch.equal(logits(model), logits(trained[1]))


@transformers_takes_this_peft
def test_transformers_add_adapter_trains_and_saves(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(config(balance_coef=1.0))
    randomise(model)
    model.train()(**batch()).loss.backward()
    assert all("hycam_" in name for name in gradients(model))
    assert len(router_statistics(model)) == 2
    model.save_pretrained(tmp_path / "adapter")
    assert "import hycam" in (tmp_path / "adapter" / "README.md").read_text()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))


def test_two_adapters():
    """Add, switch, both at once (one after the other), delete."""
    model = adapted_model(layers_to_transform=[0])
    alone = logits(model)
    model.add_adapter("other", config(r=2, num_experts=2, bias=True, train_router=False))
    assert torch.equal(logits(model), alone), "an added adapter is not active"
    assert all(".other" not in name for name, p in model.named_parameters() if p.requires_grad)
    randomise(model, seed=3)
    model.set_adapter("other")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".other" in name and "router" not in name for name in trained)
    other = logits(model)
    model.set_adapter("default")
    first = logits(model)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert len({value.sum().item() for value in (first, other, both)}) == 3

    layer = layers_of(model)["base_model.model.model.layers.0.self_attn"]
    hidden = torch.randn(1, 4, 32)
    positions = model.model.model.rotary_emb(hidden, torch.arange(4)[None])
    h_att = layer.base_layer(hidden, position_embeddings=positions, attention_mask=None)[0]
    got = layer(hidden, position_embeddings=positions, attention_mask=None)[0]
    want = h_att * (1 + layer.modulation(hidden, "default")) * (1 + layer.modulation(hidden, "other"))
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="adapter_name: got none while default, other are active"):
        router_statistics(model)
    assert len(router_statistics(model, "default")) == 1
    assert len(router_statistics(model, "other")) == 2

    model.delete_adapter("default")
    assert model.base_model.active_adapters == ["other"]
    assert not parameters(model, "default")
    assert torch.equal(logits(model), other)
    with pytest.raises(ValueError, match="adapter_name: got 'default'"):
        router_statistics(model, "default")


def test_two_adapters_are_saved_apart(tmp_path):
    model = adapted_model()
    model.add_adapter("other", config(r=2))
    randomise(model, seed=3)
    first = logits(model)
    model.set_adapter("other")
    second = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    assert torch.equal(logits(again), first)
    again.set_adapter("other")
    assert torch.equal(logits(again), second)


def test_two_adapters_both_residual():
    model = adapted_model(modulation="residual", noise="never")
    model.add_adapter("other", config(modulation="residual", noise="never"))
    randomise(model, seed=3)
    model.base_model.set_adapter(["default", "other"])
    model.train()(**batch()).loss.backward()
    assert all(gradient.any() for gradient in gradients(model).values())


def test_inject_without_a_peft_model():
    model = inject_adapter_in_model(config(), tiny_model())
    assert len(layers_of(model)) == 2
    model.train()(**batch()).loss.backward()
    assert gradients(model)


@transformers_takes_this_peft
@pytest.mark.parametrize(("order", "adapted"), [("lora first", 4), ("hycam first", 2)])
def test_lora_beside_hycam(order, adapted):
    """PEFT puts no adapter inside another's layer: LoRA on an attention's projections has to come first."""
    model = tiny_model()
    lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    adapters = [("lora", lora), ("hycam", config())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns about every second adapter
        for name, settings in adapters if order == "lora first" else reversed(adapters):
            model.add_adapter(settings, adapter_name=name)
    model.set_adapter(["lora", "hycam"])
    randomise(model)
    model.train()(**batch()).loss.backward()
    trained = gradients(model)
    assert sum(".hycam_" in name for name in trained) == 10
    assert sum(".lora_A." in name for name in trained) == adapted


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_with_the_reason(method):
    model = adapted_model()
    want = logits(model)
    with pytest.raises(NotImplementedError, match="the modulation depends on the input"):
        getattr(model, method)()
    assert torch.equal(logits(model), want)


def test_mixed_models_are_refused():
    with pytest.raises(ValueError, match="HYCAM"):
        get_peft_model(tiny_model(), config(), mixed=True)


def test_task_ids_are_refused():
    with pytest.raises(ValueError, match="task_ids: got a value, want none"):
        adapted_model().get_base_model()(**batch(), task_ids=torch.zeros(3))


def test_unload_restores_the_backbones_norms():
    base = tiny_model()
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    want = base(**inputs).logits
    model = get_peft_model(base, config(train_norms=True)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.3)
    assert not torch.equal(model(**inputs).logits, want)
    assert torch.equal(model.unload()(**inputs).logits, want)


def test_unload_leaves_no_trace():
    model = adapted_model(modulation="residual", train_norms=True)
    base = model.unload()
    assert not layers_of(base)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    assert base.state_dict().keys() == tiny_model().state_dict().keys()
    assert torch.equal(logits(base), logits(tiny_model()))
    get_peft_model(base, config())(**batch())


def test_a_failed_second_adapter_leaves_the_first_working():
    model = adapted_model(modulation="residual", noise="never")
    want = logits(model)
    with pytest.raises(ValueError, match="layers_to_transform"):
        model.add_adapter("other", config(layers_to_transform=[5]))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), want)


def test_statistics_report_the_last_forward():
    model = adapted_model()
    assert router_statistics(model) == {}
    model(**batch())
    first = router_statistics(model)
    assert list(first) == [f"base_model.model.model.layers.{index}.self_attn" for index in (0, 1)]
    for kept in first.values():
        assert kept.load.shape == (3,)
        assert kept.load.sum() == pytest.approx(1.0, abs=1e-5)
        assert not kept.load.requires_grad
        assert 0 < kept.balance_loss < 1
    model(**batch(1, rows=2))
    assert all(kept.tokens == 13 for kept in router_statistics(model).values())
    with pytest.raises(ValueError, match="adapter_name: got 'other'"):
        router_statistics(model, "other")
    with pytest.raises(ValueError, match="adapter_name: got None"):
        router_statistics(tiny_model())


@pytest.fixture
def swapped(tmp_path):
    """A loaded adapter, and another with the same settings in a folder."""
    model, other = adapted_model(train_norms=True), adapted_model(train_norms=True)
    randomise(other, seed=9)
    other.save_pretrained(tmp_path)
    return model, other, tmp_path


@pytest.mark.parametrize("adapter_name", ["default", "mine"])
def test_hotswap_is_in_place(swapped, adapter_name):
    _, other, folder = swapped
    model = get_peft_model(tiny_model(), config(train_norms=True), adapter_name=adapter_name)
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    hotswap_adapter(model, folder, adapter_name=adapter_name)
    assert torch.equal(logits(model), logits(other))
    for name, parameter in model.named_parameters():
        assert before[name] == (parameter, parameter.data_ptr())


@transformers_takes_this_peft
def test_hotswap_on_a_transformers_model(swapped):
    _, other, folder = swapped
    model = tiny_model()
    model.add_adapter(config(train_norms=True))
    hotswap_adapter(model, folder)
    assert torch.equal(logits(model), logits(other))


def test_hotswap_refuses_before_it_writes(swapped):
    model, _, folder = swapped
    want = logits(model)
    with pytest.raises(ValueError, match="adapter_name: got 'other', want a loaded HyCAM adapter"):
        hotswap_adapter(model, folder, adapter_name="other")
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"tau": 0.9, "r": 4}))
    with pytest.raises(ValueError, match=re.escape("differs in tau (0.5 loaded, 0.9 saved)")):
        hotswap_adapter(model, folder)
    path.write_text(json.dumps(saved))
    state = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.hycam_lora_a"
    save_file(state | {name: state[name][:, :2].contiguous()}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"got shape \(3, 2, 32\) for model.layers.1.self_attn.hycam_lora_a"):
        hotswap_adapter(model, folder)
    del state[name]
    save_file(state, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"got shape None for model.layers.1.self_attn.hycam_lora_a"):
        hotswap_adapter(model, folder)
    assert torch.equal(logits(model), want)


def test_public_names():
    for name in ("HyCAMAttention", "HyCAMConfig", "bind", "hotswap_adapter", "router_statistics"):
        assert hasattr(hycam, name)
    assert HyCAMAttention is hycam.HyCAMAttention
