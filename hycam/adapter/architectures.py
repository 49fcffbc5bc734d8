"""What HyCAM knows of model architectures: their norms, and how an attention's output joins the residual."""

from dataclasses import dataclass

from torch import nn

from hycam.errors import InputError

_ROUNDED_LATE = "its norm rounds after it has multiplied by the weight"
_ONE_PLUS = "its norm multiplies by 1 + weight"
_WEIGHTLESS = "its norm has no weight"
_NO_NORM = "its attention receives the residual stream without a norm"
_DROPS = "puts dropout between the attention's output and the residual addition"
_NORMS = "puts a norm between the attention's output and the residual addition"
_SCALES = "multiplies the attention's output by residual_multiplier before it adds it"
_PARALLEL = "adds the outputs of attention and MLP at once"


@dataclass(frozen=True)
class Architecture:
    """What no look at its modules tells of one `model_type` of transformers.

    Attributes:
        input_norm: name of the norm whose input is the residual stream that the attention's output is added to; None
            where there is no such norm.
        norms: the norms that `train_norms` trains; empty where they have no weight.
        norm_kind: what `input_norm` is, as `norm_project` names it: "rms" (normalised, rounded, times the weight) or
            "layer".
        norm_obstacle: why the norm before the attention can't be fused with the projections; None: it can.
        obstacle: what the layer does to the attention's output before it adds it to the residual stream; None: it
            just adds.
    """

    input_norm: str | None = "input_layernorm"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_kind: str = "rms"
    norm_obstacle: str | None = None
    obstacle: str | None = None


def _each(names: str, architecture: Architecture) -> dict[str, Architecture]:
    return dict.fromkeys(names.split(), architecture)


ARCHITECTURES = {
    **_each(
        "llama mistral qwen2 qwen3 arcee aria_text axk1 bailing_hybrid bitnet cwm deepseek_v2 deepseek_v3 deepseek_v32 "
        "diffllama dots1 dots3_note_text ernie4_5 ernie4_5_moe exaone exaone_moe glm glm4_moe glm4_moe_lite "
        "glm_moe_dsa hunyuan_v1_dense hunyuan_v1_moe hy_v3 internlm3 iquestcoder jetmoe kimi_linear laguna llama4_text "
        "mellum mimo_v2_flash minimax_m2 ministral ministral3 mixtral mllama_text_model olmoe qwen2_moe qwen3_moe "
        "sarvam_mla sarvam_moe seed_oss smollm3 solar_open youtu",
        Architecture(),
    ),
    **_each("bamba jamba", Architecture(norms=("input_layernorm", "pre_ff_layernorm"))),
    **_each("lfm2 lfm2_moe", Architecture(input_norm="operator_norm", norms=("operator_norm", "ffn_norm"))),
    **_each(
        "apertus apertus1p5_text",
        Architecture(input_norm="attention_layernorm", norms=("attention_layernorm", "feedforward_layernorm")),
    ),
    **_each("jais2 persimmon phimoe starcoder2", Architecture(norm_kind="layer")),
    **_each("gpt2 gpt_bigcode", Architecture(input_norm="ln_1", norms=("ln_1", "ln_2"), norm_kind="layer")),
    **_each("flint gpt_oss helium", Architecture(norm_obstacle=_ROUNDED_LATE)),
    **_each(
        "gemma minimax_m3_vl_text nemotron qwen3_5_moe_text qwen3_5_text qwen3_next",
        Architecture(norm_obstacle=_ONE_PLUS),
    ),
    "vaultgemma": Architecture(norms=("input_layernorm", "pre_feedforward_layernorm"), norm_obstacle=_ONE_PLUS),
    **_each("nanochat olmo", Architecture(norms=(), norm_obstacle=_WEIGHTLESS)),
    **_each("phi3 phi4_multimodal", Architecture(obstacle=_DROPS)),
    **_each(
        "granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared",
        Architecture(obstacle=_SCALES),
    ),
    "glm4": Architecture(obstacle=_NORMS),
    **_each("gemma2 gemma3_text", Architecture(norm_obstacle=_ONE_PLUS, obstacle=_NORMS)),
    **_each(
        "olmo2 olmo3 exaone4 flex_olmo",
        Architecture(input_norm=None, norms=("post_attention_layernorm",), norm_obstacle=_NO_NORM, obstacle=_NORMS),
    ),
    "gpt_neox": Architecture(norm_kind="layer", obstacle=_DROPS),
    "phi": Architecture(norms=("input_layernorm",), norm_kind="layer", obstacle=_PARALLEL),
    **_each("codegen gptj", Architecture(input_norm="ln_1", norms=("ln_1",), norm_kind="layer", obstacle=_PARALLEL)),
}


def model_type_of(module: nn.Module) -> str | None:
    """`model_type` of the transformers configuration that `module` carries, or None."""
    return getattr(getattr(module, "config", None), "model_type", None)


def residual_norm(model_type: str | None) -> str:
    """Name of the norm inside a decoder layer whose input is the layer's residual stream h_in.

    Raises:
        InputError: where ``h_in + h_att`` is not what the layer computes, or HyCAM doesn't know it.
    """
    known = ARCHITECTURES.get(model_type or "")
    if known is None:
        raise InputError(
            f"modulation: got 'residual' for model_type {model_type!r}, want 'attention': HyCAM doesn't know whether "
            "its layers add the attention's output as it is"
        )
    if known.obstacle is not None or known.input_norm is None:
        raise InputError(
            f"modulation: got 'residual' for model_type {model_type!r}, want 'attention': its decoder layer "
            f"{known.obstacle}"
        )
    return known.input_norm


def fusible_norm(model_type: str | None) -> tuple[str, str]:
    """Name and kind of the norm inside a decoder layer whose output is the attention's h.

    Raises:
        InputError: where there is no such norm, it isn't one that `norm_project` computes, or HyCAM doesn't know it.
    """
    known = ARCHITECTURES.get(model_type or "")
    if known is None or known.norm_obstacle is not None or known.input_norm is None:
        reason = "HyCAM doesn't know its norm before the attention" if known is None else known.norm_obstacle
        raise InputError(f"fuse_norm: got True for model_type {model_type!r}, want False: {reason}")
    return known.input_norm, known.norm_kind


def trained_norms(model_type: str | None) -> tuple[str, ...]:
    """Names of the norms inside a decoder layer that `train_norms` trains.

    Raises:
        InputError: for an unknown architecture, and where the norms have no weight.
    """
    known = ARCHITECTURES.get(model_type or "")
    if known is None:
        raise InputError(
            f"train_norms: got True for model_type {model_type!r}, want False, or the norms in modules_to_save: HyCAM "
            "doesn't know its norms"
        )
    if not known.norms:
        raise InputError(f"train_norms: got True for model_type {model_type!r}, want False: {_WEIGHTLESS}")
    return known.norms


def hidden_size_of(module: nn.Module) -> int | None:
    """Hidden size by the transformers configuration that `module` carries, or None."""
    config = getattr(module, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "hidden_size", None)
