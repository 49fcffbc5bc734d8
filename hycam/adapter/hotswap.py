"""Exchange an adapter's weights in place."""

import os
from typing import Any

from peft import PeftConfig
from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

from hycam.adapter.config import HyCAMConfig
from hycam.errors import InputError

# Fields that say nothing about the computation, or are filled in by PEFT.
_FREE_FIELDS = {
    "auto_mapping",
    "base_model_name_or_path",
    "format_version",
    "fuse_norm",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
}


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike,
    adapter_name: str = "default",
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Replace the weights of a loaded HyCAM adapter by those of a saved one, in place.

    Parameters keep their identity, so compiled models aren't compiled again. Unlike PEFT's function of this name it
    takes HyCAM adapters, and neither changes nor keeps the optimiser's state.

    Args:
        model: a `PeftModel`, or a transformers model with the adapter injected.
        model_name_or_path: folder or hub id of the saved adapter.
        adapter_name: the loaded adapter whose weights are replaced.
        torch_device: where the saved weights are read to; None: the CPU.
        kwargs: passed on to the hub download (`revision`, `token`, `subfolder`, ...).

    Raises:
        InputError: (a ValueError), before any weight is touched, where the adapter isn't loaded or isn't HyCAM, or
            the saved one has other settings, layers or shapes.
    """
    path = os.fspath(model_name_or_path)
    configs = getattr(model, "peft_config", {})
    loaded = configs.get(adapter_name)
    if not isinstance(loaded, HyCAMConfig):
        raise InputError(f"adapter_name: got {adapter_name!r}, want a loaded HyCAM adapter of the model")
    _check_same_settings(loaded, HyCAMConfig.from_pretrained(path, **kwargs))
    weights = load_peft_weights(path, device=torch_device or "cpu", **kwargs)
    weights = _as_named_in(get_peft_model_state_dict(model, adapter_name=adapter_name), weights)
    set_peft_model_state_dict(model, weights, adapter_name=adapter_name)


def _check_same_settings(loaded: HyCAMConfig, saved: object) -> None:
    if not isinstance(saved, HyCAMConfig):
        raise InputError(f"model_name_or_path: got a {type(saved).__name__}, want a saved HyCAM adapter")
    differing = differing_settings(loaded, saved)
    if differing:
        shown = ", ".join(f"{name} ({ours!r} loaded, {theirs!r} saved)" for name, (ours, theirs) in differing.items())
        raise InputError(f"model_name_or_path: got an adapter that differs in {shown}, want the loaded one's settings")


def differing_settings(ours: PeftConfig, theirs: PeftConfig) -> dict[str, tuple[Any, Any]]:
    """Name -> the two values of the settings that reach the computation and differ."""
    first, second = ours.to_dict(), theirs.to_dict()
    return {
        name: (first[name], second[name])
        for name in sorted(first)
        if name not in _FREE_FIELDS and _comparable(first[name]) != _comparable(second[name])
    }


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | list | tuple) else value


def _as_named_in(loaded: dict[str, Tensor], saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """The saved weights by the loaded adapter's names, which lack PEFT's prefix where no `PeftModel` is around it."""
    prefix = "base_model.model."
    ours = {name.removeprefix(prefix): name for name in loaded}
    theirs = {name.removeprefix(prefix): tensor for name, tensor in saved.items()}
    for name in sorted(ours.keys() | theirs.keys()):
        want = tuple(loaded[ours[name]].shape) if name in ours else None
        got = tuple(theirs[name].shape) if name in theirs else None
        if got != want:
            raise InputError(f"model_name_or_path: got shape {got} for {name}, want {want} as in the loaded adapter")
    return {ours[name]: tensor for name, tensor in theirs.items()}
