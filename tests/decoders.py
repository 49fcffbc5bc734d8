"""A tiny model of every causal LM that transformers ships, from its own configuration with the sizes made small.

`tests/models.py` has the few whose sizes are written out; these are made by the names of the fields.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

_FIELDS: dict[Any, str] = {
    32: "hidden_size d_model n_embd embed_dim embedding_size embedding_dim emb_dim dim_model word_embed_proj_dim "
    "attention_hidden_size shape_embed_dim pronunciation_embed_dim hidden_size_global backbone_hidden_size lru_width "
    "router_hidden_size adapter_in_dim adapter_out_dim mlp_dim",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts index_n_heads kv_lora_rank q_lora_rank o_lora_rank "
    "linear_num_heads linear_num_value_heads num_decoder_attention_heads num_encoder_attention_heads mamba_n_heads "
    "n_mamba_heads mamba_num_heads qk_rope_head_dim qk_nope_head_dim rotary_dim mamba_d_state hc_lowrank "
    "gated_norm_rank laurel_rank adapter_rank mamba_dt_rank index_topk output_channels patch_size o_groups",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_blocks num_key_value_heads kv_n_heads moe_topk moe_top_k moe_k top_k_experts "
    "linear_num_key_heads num_nextn_predict_layers zero_expert_num num_residual_layers num_experts_per_token",
    8: "head_dim v_head_dim attention_head_size d_kv kv_channels index_head_dim linear_head_dim linear_key_head_dim "
    "linear_value_head_dim hidden_size_per_layer_input attention_head_dim ple_embed_dim",
    16: "mamba_d_head mamba_head_dim mamba_headdim image_size",
    64: "intermediate_size ffn_dim d_ff dff decoder_ffn_dim encoder_ffn_dim moe_intermediate_size dim_ff n_inner "
    "shared_expert_intermediate_size shared_intermediate_size ffn_hidden_size intermediate_size_mlp "
    "expert_ffn_hidden_size feed_forward_size num_centroids shared_experts_intermediate_size",
    128: "vocab_size decoder_vocab_size max_position_embeddings n_positions n_ctx max_target_positions "
    "max_seq_len model_max_length vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size "
    "encoder_hash_byte_group_vocab unpadded_vocab_size ngram_vocab_size_base context_length",
    1: "n_group topk_group num_expert_group n_groups mamba_n_groups",
    0.0: "attention_dropout hidden_dropout resid_pdrop embd_pdrop emb_pdrop dropout activation_dropout "
    "hidden_dropout_prob attention_probs_dropout_prob embedding_dropout ffn_dropout",
}
_SMALL = {name: value for value, names in _FIELDS.items() for name in names.split()}
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

# What the names don't tell: fields of whose sizes one must divide, sum to or equal another, and kinds of layers that
# the first two don't show.
_HYBRID: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2}
_SHARED_KEYS: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
_QWEN4: dict[str, Any] = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 2,
}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": _HYBRID | {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dory": {
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "dots3_note": {"audio_config": {"adapter_input_size": 32}},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "gemma3n_text": _SHARED_KEYS | {"intermediate_size": [64] * 4, "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0]},
    "granitemoehybrid": _HYBRID | {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_hidden_layers": 16, "num_layers_per_stack": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "phi4_multimodal": {
        "audio_config": {"nemo_conv_channels": 32, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32}
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlnet": {"d_head": 8},
    "xlstm": {"embedding_dim": 32, "num_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_expand": 2,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
    },
}


def tiny_decoder_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """The configuration of `model_type` with each kind of layer once, at least two layers in all."""
    config_class = CONFIG_MAPPING[model_type]
    fields = config_class().to_dict()
    return config_class(**(_merged(_shrunk(fields), _OVERRIDES.get(model_type, {})) | changes))


def tiny_decoder(model_type: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random causal LM in eval mode. Weights are large enough that attention moves the logits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_decoder_config(model_type, **changes), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "conv" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def _shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    depth = next((fields[name] for name in _DEPTHS if isinstance(fields.get(name), int)), None)
    kept = _kept_layers(fields, depth)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if name in ("model_type", "transformers_version", "architectures"):
            continue
        if name == "per_layer_config" and isinstance(value, dict):
            small[name] = {kept.index(int(index)): _shrunk(own) for index, own in value.items() if int(index) in kept}
        elif isinstance(value, dict):
            small[name] = _shrunk(value) if "model_type" in value else value
        elif isinstance(value, list) and depth is not None and len(value) == depth and not isinstance(value[0], dict):
            small[name] = [_small(name, value[index], fields) for index in kept]
        else:
            small[name] = len(kept) if name in _DEPTHS and isinstance(value, int) else _small(name, value, fields)
    return small


def _small(name: str, value: Any, fields: dict[str, Any]) -> Any:
    if value is None or isinstance(value, bool | str | list):
        return value
    if name.endswith("token_id") and isinstance(value, int):
        return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, 3)
    if name == "num_key_value_heads" and value == fields.get("num_attention_heads"):
        return 4
    if name == "head_dim" and value == fields.get("qk_rope_head_dim"):
        return _SMALL["qk_rope_head_dim"]
    if name == "qk_head_dim":
        return _SMALL["qk_rope_head_dim"] + _SMALL["qk_nope_head_dim"]
    if name in ("num_key_value_heads", "num_experts_per_tok", "num_kv_shared_layers"):
        return min(value, 2)
    return type(value)(_SMALL[name]) if name in _SMALL else value


def _kept_layers(fields: dict[str, Any], depth: int | None) -> list[int]:
    """The first layer of each kind, and a second one where all are alike."""
    if depth is None:
        return [0, 1]
    kinds: list[Any] = [0] * depth
    for name in ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types"):
        if isinstance(fields.get(name), list) and len(fields[name]) == depth:
            kinds = list(zip(kinds, fields[name], strict=True))
    first = [index for index, kind in enumerate(kinds) if kind not in kinds[:index]]
    return first if len(first) > 1 else [0, 1]


def _merged(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(fields)
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(fields.get(name), dict) and "model_type" not in value:
            value = _merged(fields[name], value)
        merged[name] = value
    return merged
