"""Backbones by the shapes of known models, with random weights: built from configurations, nothing is downloaded."""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config

_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
}
_TINY: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "Llama-3.2-1B": lambda: LlamaConfig(
        **_LLAMA_3, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        tie_word_embeddings=True,
    ),
    "Llama-3.1-8B": lambda: LlamaConfig(
        **_LLAMA_3, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    ),
    "Qwen2.5-7B": lambda: Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=131072,
    ),
    "SmolLM2-135M": lambda: LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rms_norm_eps=1e-5, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "tiny-llama": lambda: LlamaConfig(**_TINY),
    "tiny-qwen2": lambda: Qwen2Config(**_TINY),
}  # fmt: skip


@dataclass(frozen=True)
class ModelShape:
    """A training batch: ``batch`` rows of ``length`` tokens through the backbone called ``model``.

    ``layers`` and ``vocabulary`` replace those of the backbone, for checks and counts.
    """

    model: str
    batch: int
    length: int
    num_experts: int = 5
    rank: int = 64
    layers: int | None = None
    vocabulary: int | None = None

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def config(self) -> PretrainedConfig:
        config = CONFIGS[self.model]()
        if self.layers is not None:
            config.num_hidden_layers = self.layers
        if self.vocabulary is not None:
            config.vocab_size = self.vocabulary
        return config

    def cut(self) -> "ModelShape":
        """The same widths, few enough layers, words and tokens for float64."""
        return replace(self, batch=min(self.batch, 2), length=min(self.length, 256), layers=2, vocabulary=512)

    def as_dict(self) -> dict[str, int | str]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        return f"{self.model} {self.batch} x {self.length} E={self.num_experts} r={self.rank}"


def build(shape: ModelShape, dtype: torch.dtype, device: torch.device, *, liger: bool = False) -> PreTrainedModel:
    """A causal language model with random weights, the same ones for a seed of torch's generator.

    Args:
        liger: replace the norms, MLPs and loss of this instance by liger-kernel's.

    Raises:
        ImportError: liger-kernel isn't installed.
    """
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config, dtype=dtype, attn_implementation="sdpa")
    if liger:
        _apply_liger(model)
    return model


def _apply_liger(model: PreTrainedModel) -> None:
    """Liger's layers in this model alone: it also replaces names of transformers' module, for models built later."""
    from transformers.integrations.liger import apply_liger_kernel

    module = vars(sys.modules[type(model).__module__])
    before = dict(module)
    try:
        # the rotary embedding is looked up by its name in each forward, so it can't be this model's alone
        apply_liger_kernel(model, {"rope": False})
    finally:
        module.update(before)


def randomise_zeros(model: nn.Module) -> None:
    """Fill the trainable parameters that start at zero with random numbers, so that no product of zeros is timed."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.1 * parameter.shape[-1] ** -0.5)
