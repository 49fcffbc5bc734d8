"""A tiny Llama in one GGUF file, as llama.cpp's converter writes it: no network, and nothing but gguf's own writer."""

import json
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training.runs import save_backbone

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def save_gguf(folder: Path, matrices: GGMLQuantizationType = GGMLQuantizationType.Q8_0) -> tuple[Path, Path]:
    """The model of `save_backbone` as `tiny.gguf` in a folder of its own.

    Returns:
        The file, and the folder of the model that it was made from.
    """
    original = save_backbone(folder / "original", hidden_size=32)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(original), AutoTokenizer.from_pretrained(original)
    config = model.config
    file = folder / "gguf" / "tiny.gguf"
    file.parent.mkdir()
    writer = GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = tokenizer.all_special_ids
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([TokenType.CONTROL if number in special else TokenType.NORMAL for _, number in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for name, weight in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if part in name:  # llama.cpp turns by pairs of neighbours where transformers turns by halves
                weight = weight.reshape(count, 2, -1, config.hidden_size).swapaxes(1, 2).reshape(weight.shape)
        data = weight.to(torch.float32).numpy()
        matrix = matrices if weight.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(_gguf_name(name), quants.quantize(data, matrix), raw_dtype=matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, original


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, inner = stem.split(".", 3)
        return f"blk.{layer}.{_NAMES[inner]}.weight"
    return f"{_NAMES[stem]}.weight"
