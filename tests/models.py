"""Tiny models, random weights, built from a seed: one per architecture that the tests need."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

_SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_GPT2 = {
    "vocab_size": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_CONFIGS = {
    "llama": lambda **kw: LlamaConfig(**(_SIZES | kw)),
    "mistral": lambda **kw: MistralConfig(**(_SIZES | kw)),
    "qwen2": lambda **kw: Qwen2Config(**(_SIZES | kw)),
    "qwen3": lambda **kw: Qwen3Config(**(_SIZES | {"head_dim": 8} | kw)),
    "qwen3_moe": lambda **kw: Qwen3MoeConfig(**(_SIZES | _EXPERTS | kw)),
    "smollm3": lambda **kw: SmolLM3Config(**(_SIZES | kw)),
    "gemma2": lambda **kw: Gemma2Config(**(_SIZES | {"head_dim": 8} | kw)),
    "phi3": lambda **kw: Phi3Config(**(_SIZES | kw)),
    "olmo2": lambda **kw: Olmo2Config(**(_SIZES | kw)),
    "granite": lambda **kw: GraniteConfig(**(_SIZES | kw)),
    "gpt_neox": lambda **kw: GPTNeoXConfig(**(_SIZES | kw)),
    "gpt2": lambda **kw: GPT2Config(**(_GPT2 | kw)),
}


def tiny_config(family: str = "llama", **overrides) -> PretrainedConfig:
    return _CONFIGS[family](**overrides)


def tiny_model(family: str = "llama", *, seed: int = 0, dtype=torch.float32, **overrides) -> PreTrainedModel:
    """A random causal LM in eval mode. Weights are large enough that attention moves the logits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=dtype)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def longrope(switch: int) -> dict[str, Any]:
    """Rope parameters whose frequencies change for rows of more than ``switch`` tokens, of heads 8 wide."""
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": switch,
    }
