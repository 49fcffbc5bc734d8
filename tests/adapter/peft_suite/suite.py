"""PEFT's own suites for decoders and for custom models, with HyCAM in place of the methods that they list.

`tests/adapter/test_peft_suite.py` puts this file beside PEFT's as `test_hycam.py`, `differences.py` as `conftest.py`,
and runs them in a process of its own. PEFT's lists of settings are replaced before its tests are collected.
"""

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import peft
import pytest
import torch
from torch import nn

# PEFT's common module imports a pipeline that only its tests of diffusion models use
sys.modules.setdefault("diffusers", ModuleType("diffusers")).StableDiffusionPipeline = type("Pipeline", (), {})

from hycam import HyCAMConfig  # noqa: E402

from . import test_custom_models, test_decoder_models, testing_common  # noqa: E402

SETTINGS = {
    "paper": {},
    "fixed": {"bias": True, "train_router": False, "lora_alpha": 8.0, "noise": "never", "routing": "hard"},
    "ablation": {"shared": "slora", "experts": "full"},
    "norms": {"train_norms": True},
}


def _configs(**settings):
    return [{"r": 4, "num_experts": 2, **settings, **others} for others in SETTINGS.values()]


class Attention(nn.Module):
    """Of the custom model: it takes what attentions take, and returns a tuple."""

    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(20, 20)
        self.config = SimpleNamespace(hidden_size=20)

    def forward(self, hidden_states, attention_mask=None):
        return self.projection(hidden_states), None


class AttentionModel(nn.Module):
    """PEFT's MLP with an attention in its middle."""

    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.attention = Attention()
        self.lin1 = nn.Linear(20, 2)
        self.sm = nn.LogSoftmax(dim=-1)
        self.dtype = torch.float

    def forward(self, X):  # noqa: N803
        hidden = self.lin0(X.to(self.dtype))
        return self.sm(self.lin1(hidden + self.attention(hidden)[0]))


class AttentionModels:
    """What the suite takes for a transformers class."""

    @classmethod
    def from_pretrained(cls, model_id, dtype=None):
        torch.manual_seed(0)
        model = AttentionModel().to(dtype or torch.float32)
        model.dtype = dtype or torch.float32
        return model


@dataclass
class SuiteConfig(HyCAMConfig):
    """With the suites' name for an adapter that changes the model from the start; HyCAM's own start changes nothing."""

    init_weights: bool = True


def _leave_start(model, adapter_name):
    """Move the adapter's parameters off their start, where its settings say so."""
    if not getattr(model.peft_config[adapter_name], "init_weights", True):  # what is loaded has HyCAM's settings
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "hycam_" in name and f".{adapter_name}" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.2)


def _get_peft_model(model, config, adapter_name="default", **kwargs):
    adapted = peft.get_peft_model(model, config, adapter_name=adapter_name, **kwargs)

    def add_adapter(adapter_name, *args, **kwargs):
        type(adapted).add_adapter(adapted, adapter_name, *args, **kwargs)
        _leave_start(adapted, adapter_name)

    adapted.add_adapter = add_adapter
    _leave_start(adapted, adapter_name)
    return adapted


for module in (testing_common, test_decoder_models, test_custom_models):
    module.get_peft_model = _get_peft_model
# the marks of the suites' tests hold these lists
test_decoder_models.ALL_CONFIGS[:] = [(SuiteConfig, kwargs) for kwargs in _configs(task_type="CAUSAL_LM")]
test_custom_models.TEST_CASES[:] = [
    (name, "Attention", SuiteConfig, kwargs | {"target_modules": ["attention"]})
    for name, kwargs in zip(SETTINGS, _configs(), strict=True)
    if name != "norms"
]


class TestDecoders(test_decoder_models.TestDecoderModels):
    """With the tests of batches of several adapters, which PEFT runs for LoRA alone."""

    @pytest.fixture(autouse=True)
    def _as_lora(self, request, monkeypatch):
        if "mixed_adapter_batches" in request.node.originalname:
            for module in (testing_common, test_decoder_models):
                monkeypatch.setattr(module, "LoraConfig", SuiteConfig)


class TestCustomModels(test_custom_models.TestPeftCustomModel):
    transformers_class = AttentionModels
