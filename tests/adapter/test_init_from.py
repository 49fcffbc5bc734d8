"""Going on from a trained adapter: what is kept, what is new, and what is refused before a weight is changed."""

import json

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from hycam import init_from
from hycam.adapter.init_from import check_init
from hycam.methods import MultiLoraConfig
from tests.adapter.builders import adapted_model, batch, config
from tests.models import tiny_model


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch()).logits


def weights(model):
    return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}


@pytest.fixture
def saved(tmp_path):
    """A trained adapter of 3 experts, of two layers, and its folder."""
    model = adapted_model()
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_the_same_settings_go_on_where_it_stopped(saved):
    trained, folder = saved
    model = get_peft_model(tiny_model(), config())
    assert init_from(model, folder) == f"from {folder}: 10 of 10 tensors kept"
    assert torch.equal(logits(model), logits(trained))
    assert all(p.requires_grad == ("hycam_" in name) for name, p in model.named_parameters())


def test_experts_are_added_behind_those_that_are_kept(saved):
    trained, folder = saved
    model = get_peft_model(tiny_model(), config(num_experts=5, tau=1.0))
    fresh, old = weights(model), weights(trained)
    said = init_from(model, folder)
    assert said == (
        f"from {folder}: 10 of 10 tensors kept, experts 0 to 2 of 5; experts 3 to 4 are new; "
        "settings that differ: tau (0.5 saved)"
    )
    for name, got in weights(model).items():
        assert torch.equal(got[: len(old[name])], old[name])
        if "hycam_shared" not in name:
            assert len(got) == 5 and torch.equal(got[3:], fresh[name][3:])


def test_experts_beside_a_shared_cam_that_is_kept(tmp_path):
    trained = adapted_model(experts="none")
    trained.save_pretrained(tmp_path)
    model = get_peft_model(tiny_model(), config())
    fresh = weights(model)
    said = init_from(model, tmp_path)
    assert said.startswith(f"from {tmp_path}: 2 of 10 tensors kept; new: hycam_lora_a, hycam_lora_b, hycam_lora_n, hyc")
    assert said.endswith("; settings that differ: experts ('none' saved)")
    for name, got in weights(model).items():
        assert torch.equal(got, weights(trained)[name] if "shared" in name else fresh[name])
    assert torch.allclose(logits(model), logits(trained), atol=1e-5), "new experts add nothing at their start"


def test_a_model_without_the_adapter(saved):
    with pytest.raises(ValueError, match="adapter_name: got 'other', wanted an adapter of a PeftModel"):
        init_from(adapted_model(), saved[1], "other")
    with pytest.raises(ValueError, match="adapter_name: got 'default', wanted an adapter of a PeftModel"):
        init_from(tiny_model(), saved[1])


def test_another_method_s_adapter(tmp_path):
    trained = get_peft_model(tiny_model(), MultiLoraConfig(r=4, num_adapters=2))
    trained.save_pretrained(tmp_path)
    model = get_peft_model(tiny_model(), MultiLoraConfig(r=4, num_adapters=2))
    init_from(model, tmp_path)
    assert all(torch.equal(got, weights(trained)[name]) for name, got in weights(model).items())
    with pytest.raises(ValueError, match="an adapter of MULTILORA, wanted one of HYCAM"):
        init_from(adapted_model(), tmp_path)
    with pytest.raises(ValueError, match=r"multilora_A is \[2, 4, \d+\], wanted \[3, 4, \d+\]"):
        init_from(get_peft_model(tiny_model(), MultiLoraConfig(r=4, num_adapters=3)), tmp_path)


@pytest.mark.parametrize(
    ("settings", "sizes", "message"),
    [
        ({"num_experts": 2}, {}, r"layers\.0\.self_attn\.hycam_lora_a is \[3, 4, 32\], wanted \[2, 4, 32\]"),
        ({"r": 8}, {}, r"hycam_lora_a is \[3, 4, 32\], wanted \[3, 8, 32\]"),
        ({}, {"hidden_size": 64}, r"hycam_lora_a is \[3, 4, 32\], wanted \[3, 4, 64\]"),
        ({"shared": "none"}, {}, r"it has .*hycam_shared\.weight, for which the new settings do not ask"),
        ({"layers_to_transform": [1]}, {}, r"it has .*layers\.0\..*, for which the new settings do not ask"),
    ],
)
def test_what_does_not_fit_is_refused_without_the_model(saved, settings, sizes, message):
    """On the meta device, and nothing is changed."""
    _, folder = saved
    with torch.device("meta"):
        model = get_peft_model(tiny_model(**sizes), config(**settings))
    with pytest.raises(ValueError, match=rf"^init_from: {folder}: .*{message}$"):
        check_init(model, folder)


def test_what_is_no_adapter_is_named(saved, tmp_path):
    _, folder = saved
    model = adapted_model()
    before = weights(model)
    with pytest.raises(ValueError, match=r"init_from: .*nothing has no adapter_config\.json, wanted a folder"):
        init_from(model, tmp_path / "nothing")
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="has numbers that are not finite"):
        init_from(model, folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"init_from: .*adapter_model\.safetensors: can't be read"):
        init_from(model, folder)
    settings = folder / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"format_version": 2}))
    with pytest.raises(ValueError, match=r"not a saved adapter: .*format_version: got 2"):
        init_from(model, folder)
    assert all(torch.equal(got, before[name]) for name, got in weights(model).items())
