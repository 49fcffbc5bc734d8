"""What HyCAM does by default with every causal LM of transformers 5.24: where it goes, or why it doesn't.

`docs/architectures.md` says the same: ``python -m tests.adapter.outcomes`` draws its tables.
"""

from pathlib import Path

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.harness.pages import fill
from hycam.adapter.architectures import ARCHITECTURES

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"

# The names that are found (in models of as few layers as show every kind) -> model types.
FOUND = {
    "self_attn": "afmoe apertus apertus1p5_text arcee aria_text axk1 axk2 bamba bart beam bigbird_pegasus biogpt "
    "bitnet blenderbot blenderbot-small cohere cohere2 cohere2_moe cohere_compass_text cwm deepseek_v2 deepseek_v3 "
    "deepseek_v32 deepseek_v4 diffllama doge dory dots1 dots3_note dots3_note_text emu3 ernie4_5 ernie4_5_moe exaone "
    "exaone4 exaone_moe falcon_h1 flex_olmo flint fuyu gemma gemma2 gemma3_text gemma3n_text gemma4 gemma4_text "
    "gemma4_unified gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa got_ocr2 gpt_oss granite "
    "granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense "
    "hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling2_loop_text inkling2_text inkling_text internlm3 iquestcoder jais2 "
    "jamba kolibri1 laguna lara_mini lfm2 lfm2_moe lfm3 llama llama4 llama4_text marian mbart mellum mimo_v2_flash "
    "minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral mllama moshi mvp nanochat "
    "nemotron olmo olmo2 olmo3 olmo_hybrid olmoe opt pegasus persimmon phi phi3 phimoe plbart qwen2 qwen2_moe qwen3 "
    "qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen4_exp qwen4_exp_text sarvam_mla "
    "sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2 trocr vaultgemma whisper xglm youtu zaya",
    "attn": "codegen dbrx gpt-sw3 gpt2 gpt_bigcode gptj modernbert-decoder mpt",
    "attention": "gpt_neo gpt_neox gpt_neox_japanese",
    "self_attention": "falcon jetmoe",
    "self_attn.0 self_attn.1": "longcat_flash",
    "2.self_attn": "bailing_hybrid kimi_linear",
    "2.mixer": "nemotron_h",
    "2.temporal_block": "recurrent_gemma",
    "language_model.layers.0.self_attn language_model.layers.1.self_attn": "gemma3 moss_transcribe_diarize",
    "model.layers.0.self_attn model.layers.1.self_attn": "phi4_multimodal",
}

# How many attentions are found where it isn't one in each layer that has one by `layer_types`.
COUNTS = {
    "bamba": 1,
    "hrm_text": 4,
    "jamba": 1,
    "longcat_flash": 4,
    "minimax": 2,
    "nemotron_h": 1,
    "recurrent_gemma": 1,
}

REFUSED = {
    "has the residual stream added to its output before it reaches the layer": "bert bert-generation bloom camembert "
    "data2vec-text electra ernie git megatron-bert rembert roberta roberta-prelayernorm roc_bert roformer xlm-roberta "
    "xlm-roberta-xl xmod",
    "it has no module with heads that takes hidden_states, attention_mask and a cache of keys and values": "big_bird "
    "cpmant ctrl falcon_mamba mamba mamba2 openai-gpt reformer rwkv xlm xlnet xlstm",
    "takes 64 features where the model has 32": "zamba zamba2",
    "those it has belong to the models inside it": "blt",
}

# Their layers run several times in a forward.
RECURRENT = ("dory", "hrm_text")

# Found, and refused by the first forward.
REFUSED_LATE = {"prophetnet": "attention_mask: got shape"}

# Found, but a packed row's logits change with the row before it: why -> model types.
MIXED = {
    "no mask is made of the positions (with `eager` and `sdpa`)": "afmoe bart bigbird_pegasus biogpt blenderbot "
    "blenderbot-small gpt_oss marian mbart mpt mvp opt pegasus plbart trocr xglm",
    "convolutions, recurrent layers or compressed keys go on over a row's border": "bailing_hybrid bamba deepseek_v4 "
    "falcon_h1 granitemoehybrid inkling2_loop_text inkling2_text inkling_text jamba kimi_linear lara_mini lfm2 "
    "lfm2_moe lfm3 minimax nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next "
    "qwen4_exp qwen4_exp_text recurrent_gemma zaya",
}

# What building a small one, or running it, says.
UNBUILT = {
    "gemma3n": "requires the timm library",
    "gemma4_assistant": "must be 0, got",
    "gemma4_unified_assistant": "The set of layer types producing a cache is different|shared_kv_states cannot be",
    "musicgen": "object has no attribute 'dropout'",
    "musicgen_melody": "object has no attribute 'dropout'",
}


def by_type(groups: dict[str, str]) -> dict[str, str]:
    return {model_type: key for key, types in groups.items() for model_type in types.split()}


def decoder_type(model_type: str) -> str:
    """The model type of the decoder's own configuration, by which HyCAM knows its norms and its residual stream."""
    return CONFIG_MAPPING[model_type]().get_text_config(decoder=True).model_type


def table(name: str) -> str:
    return {"found": _found_table, "refused": _refused_table, "packed": _packed_table}[name]()


def _found_table() -> str:
    rows: dict[tuple[str, str, str], list[str]] = {}
    for model_type, names in sorted(by_type(FOUND).items()):
        own_names = sorted({name.rpartition(".")[2] for name in names.split()})
        shown = f"`{model_type}`" + ("" if "self_attn" in names else f" (`{own_names[0]}`)")
        rows.setdefault(_settings(decoder_type(model_type)), []).append(shown)
    ordered = sorted(rows.items(), key=lambda row: ("unknown" in row[0], -len(row[1])))
    head = ["| model types | `residual` | `fuse_norm` | `train_norms` |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *(f"| {', '.join(types)} | {' | '.join(cells)} |" for cells, types in ordered)])


def _settings(model_type: str) -> tuple[str, str, str]:
    known = ARCHITECTURES.get(model_type)
    if known is None:
        return ("unknown",) * 3
    return (
        f"no: {known.obstacle}" if known.obstacle else "yes",
        f"no: {known.norm_obstacle}" if known.norm_obstacle else "yes",
        ", ".join(f"`{norm}`" for norm in known.norms) or "no: they have no weights",
    )


def _refused_table() -> str:
    why = {
        "takes 64": "the attention takes wider states than it returns",
        "has the": "the residual stream is added to the attention's output before it reaches the decoder layer",
        "it has": "no attention that takes `hidden_states`, `attention_mask` and a cache of keys and values",
        "those": "several models in one, none of them the decoder",
    }
    rows = [
        f"| {', '.join(f'`{model_type}`' for model_type in types.split())} | "
        f"{next(text for start, text in why.items() if reason.startswith(start))} |"
        for reason, types in REFUSED.items()
    ]
    rows.append(
        "| `prophetnet` | the attention sees several streams of the same tokens (refused when the model runs) |"
    )
    return "\n".join(["| model types | why |", "| --- | --- |", *rows])


def _packed_table() -> str:
    rows = [f"| {', '.join(f'`{name}`' for name in types.split())} | {reason} |" for reason, types in MIXED.items()]
    return "\n".join(["| model types | why |", "| --- | --- |", *rows])


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(), table))
