"""What HyCAM knows of model architectures: their self-attention, its norms, and how its output joins the residual."""

from dataclasses import dataclass

from torch import nn

from hycam.errors import InputError


@dataclass(frozen=True)
class Architecture:
    """One `model_type` of transformers.

    Attributes:
        attention: name of the self-attention inside a decoder layer.
        input_norm: name of the norm whose input is the residual stream that the attention's output is added to; None
            where there is no such norm.
        norms: the norms that `train_norms` trains.
        norm_kind: what `input_norm` is, as `norm_project` names it: "rms" (normalised, rounded, times the weight) or
            "layer".
        norm_obstacle: why the norm before the attention can't be fused with the projections; None: it can.
        obstacle: what the layer does to the attention's output before it adds it to the residual stream; None: it
            just adds.
        is_default: whether `attention` is the target where the user names none.
    """

    attention: str = "self_attn"
    input_norm: str | None = "input_layernorm"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_kind: str = "rms"
    norm_obstacle: str | None = None
    obstacle: str | None = None
    is_default: bool = True


ARCHITECTURES = {
    "llama": Architecture(),
    "mistral": Architecture(),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "phi3": Architecture(obstacle="puts dropout between the attention's output and the residual addition"),
    "granite": Architecture(obstacle="multiplies the attention's output by residual_multiplier before it adds it"),
    "gemma2": Architecture(
        norm_obstacle="its norm multiplies by 1 + weight",
        obstacle="puts a norm between the attention's output and the residual addition",
    ),
    "olmo2": Architecture(
        input_norm=None,
        norms=("post_attention_layernorm",),
        norm_obstacle="its attention receives the residual stream without a norm",
        obstacle="puts a norm between the attention's output and the residual addition",
    ),
    "gpt_neox": Architecture(
        attention="attention",
        norm_kind="layer",
        obstacle="puts dropout between the attention's output and the residual addition",
        is_default=False,
    ),
    "gpt2": Architecture(
        attention="attn", input_norm="ln_1", norms=("ln_1", "ln_2"), norm_kind="layer", is_default=False
    ),
}


def default_targets() -> dict[str, list[str]]:
    """`model_type` -> the attention's name, for the architectures that need no `target_modules`."""
    return {name: [known.attention] for name, known in ARCHITECTURES.items() if known.is_default}


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
            f"modulation: got 'residual' for model_type {model_type!r}, want 'attention': HyCAM knows the residual "
            f"stream of {', '.join(name for name, a in ARCHITECTURES.items() if a.obstacle is None)} only"
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
        fusible = ", ".join(name for name, a in ARCHITECTURES.items() if a.norm_obstacle is None)
        reason = f"HyCAM knows the norms of {fusible} only" if known is None else known.norm_obstacle
        raise InputError(f"fuse_norm: got True for model_type {model_type!r}, want False: {reason}")
    return known.input_norm, known.norm_kind


def trained_norms(model_type: str | None) -> tuple[str, ...]:
    """Names of the norms inside a decoder layer that `train_norms` trains.

    Raises:
        InputError: for an unknown architecture.
    """
    known = ARCHITECTURES.get(model_type or "")
    if known is None:
        raise InputError(
            f"train_norms: got True for model_type {model_type!r}, want False, or the norms in modules_to_save: HyCAM "
            f"knows the norms of {', '.join(ARCHITECTURES)} only"
        )
    return known.norms


def hidden_size_of(module: nn.Module) -> int | None:
    """Hidden size by the transformers configuration that `module` carries, or None."""
    config = getattr(module, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "hidden_size", None)
