"""The settings: what is refused, the presets, the round trip through a file."""

import dataclasses
import json

import pytest
from peft import PeftConfig

from hycam import HyCAMConfig
from hycam.errors import InputError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", 2.5),
        ("r", "64"),
        ("r", True),
        ("num_experts", 0),
        ("num_experts", None),
        ("tau", 0.0),
        ("tau", -1),
        ("tau", float("nan")),
        ("tau", "0.5"),
        ("balance_coef", -0.1),
        ("balance_coef", float("inf")),
        ("balance_scope", "batch"),
        ("shared", "lora"),
        ("experts", True),
        ("routing", "top1"),
        ("noise", "eval"),
        ("noise", None),
        ("train_router", 1),
        ("bias", "none"),
        ("lora_alpha", 0),
        ("lora_alpha", "32"),
        ("modulation", "mlp"),
        ("train_norms", "yes"),
        ("recompute", 0),
        ("fuse_norm", None),
        ("layers_to_transform", -1),
        ("layers_to_transform", []),
        ("layers_to_transform", [0, "1"]),
        ("layers_to_transform", True),
        ("target_modules", []),
        ("target_modules", ""),
        ("target_modules", ["self_attn", 3]),
        ("target_modules", 3),
        ("backend", "cuda"),
    ],
)
def test_a_bad_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: got ") as error:
        HyCAMConfig(**{field: value})
    assert isinstance(error.value, InputError)
    assert "\n" not in str(error.value)
    assert "want" in str(error.value)


def test_settings_that_contradict_each_other():
    with pytest.raises(ValueError, match="experts: got 'none' together with shared='none'"):
        HyCAMConfig(shared="none", experts="none")
    with pytest.raises(ValueError, match=r"layers_to_transform: .* regular expression"):
        HyCAMConfig(layers_to_transform=[0], target_modules=r".*\.self_attn")


def test_unknown_field():
    with pytest.raises(TypeError, match="dropout"):
        HyCAMConfig(dropout=0.1)


def test_the_defaults_are_the_papers():
    config = HyCAMConfig()
    assert (config.r, config.num_experts, config.tau, config.balance_coef, config.scale) == (64, 5, 0.5, 0.1, 1.0)
    assert (config.shared, config.experts, config.routing, config.noise) == ("full", "slora", "soft", "train")
    assert config.train_router and not config.bias and not config.train_norms
    assert dataclasses.asdict(HyCAMConfig.preset("paper")) == dataclasses.asdict(config)


def test_presets():
    released = HyCAMConfig.preset("released_code", r=16)
    assert (released.modulation, released.routing, released.noise) == ("residual", "hard", "always")
    assert released.bias and released.train_norms and not released.train_router
    assert (released.tau, released.balance_coef, released.scale) == (0.5, 0.0, 2.0)
    forms = {name: HyCAMConfig.preset(name) for name in ("shared_only", "full_spec", "spec_only", "inverse_peft")}
    assert {name: (config.shared, config.experts) for name, config in forms.items()} == {
        "shared_only": ("full", "none"),
        "full_spec": ("full", "full"),
        "spec_only": ("none", "slora"),
        "inverse_peft": ("slora", "full"),
    }
    assert HyCAMConfig.preset("spec_only", tau=1.0).tau == 1.0
    with pytest.raises(ValueError, match=r"preset: got 'papers', want one of paper, "):
        HyCAMConfig.preset("papers")


def test_file_round_trip(tmp_path):
    config = HyCAMConfig.preset("released_code", layers_to_transform=[0, 1], target_modules=["self_attn"])
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "HYCAM"
    for cls in (HyCAMConfig, PeftConfig):
        again = cls.from_pretrained(str(tmp_path))
        assert isinstance(again, HyCAMConfig)
        assert again.to_dict() == config.to_dict()


def test_a_bad_value_in_a_file_is_refused(tmp_path):
    HyCAMConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tau": 0}))
    with pytest.raises(ValueError, match="tau: got 0"):
        HyCAMConfig.from_pretrained(str(tmp_path))
