"""Going on from a trained adapter with another task, or with more experts."""

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hycam.adapter.parameters import STACKED_NAMES
from hycam.errors import InputError

# The parameters that have a slice, or a row, for each expert.
_OF_EXPERTS = ("hycam_router", *(name for name in STACKED_NAMES if not name.startswith("hycam_shared")))


def init_from(model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default") -> str:
    """Start an adapter of `model` from the weights of a saved one of the same method, where it has them.

    A HyCAM adapter may have more experts than the saved one: those come first, the others are left at their start. What
    the saved one lacks (all experts, of `shared_only`) is left at its start too.

    Args:
        model: a `PeftModel` whose adapter was just made.
        folder: of the saved adapter, in safetensors.
        adapter_name: the adapter of `model` that is started.

    Returns:
        One line that says what was kept, what is new, and which settings differ.

    Raises:
        InputError: (a ValueError), before a weight is changed, where the saved adapter can't be read, is another
            method's, has tensors that don't fit, or numbers that are not finite.
    """
    said = check_init(model, folder, adapter_name)
    weights = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    started: dict[str, Tensor] = {}
    with _opened(Path(folder)) as saved:
        for name in saved.keys():  # noqa: SIM118 (the file is no mapping)
            kept, fresh = saved.get_tensor(name), weights[name]
            started[name] = torch.cat([kept.to(fresh), fresh[len(kept) :]]) if kept.shape != fresh.shape else kept
    set_peft_model_state_dict(model, weights | started, adapter_name=adapter_name)
    return said


def check_init(model: Any, folder: str | os.PathLike, adapter_name: str = "default") -> str:
    """The line of `init_from`, and what it refuses, without a change of `model`, which may be on the meta device."""
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise InputError(f"adapter_name: got {adapter_name!r}, wanted an adapter of a PeftModel")
    config = configs[adapter_name]
    if not (Path(folder) / CONFIG_NAME).is_file():  # which PEFT would ask the hub for
        raise InputError(f"init_from: {folder} has no {CONFIG_NAME}, wanted a folder that holds an adapter")
    try:
        settings = PeftConfig.from_pretrained(os.fspath(folder))
    except Exception as error:  # PEFT's kinds are as many as the ways in which its file can be broken
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"init_from: {folder}: not a saved adapter: {reason}") from error
    if settings.peft_type != config.peft_type:
        given, wanted = (method.value for method in (settings.peft_type, config.peft_type))
        raise InputError(f"init_from: {folder}: an adapter of {given}, wanted one of {wanted}")
    weights = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    wanted = {name: list(tensor.shape) for name, tensor in weights.items()}
    with _opened(Path(folder)) as saved:
        found = {name: _finite_shape(saved.get_tensor(name), f"{folder}: {name}") for name in saved.keys()}  # noqa: SIM118
    grown = []
    for name, shape in found.items():
        if name not in wanted:
            raise InputError(f"init_from: {folder}: it has {name}, for which the new settings do not ask")
        if shape != wanted[name]:
            if not _may_grow(name, shape, wanted[name]):
                raise InputError(f"init_from: {folder}: {name} is {shape}, wanted {wanted[name]}")
            grown.append((shape[0], wanted[name][0]))
    said = f"from {folder}: {len(found)} of {len(wanted)} tensors kept"
    if grown:
        before, now = grown[0]
        said += f", experts 0 to {before - 1} of {now}; experts {before} to {now - 1} are new"
    if len(found) < len(wanted):
        new = {_parameter(name) for name in wanted if name not in found}
        said += f"; new: {', '.join(sorted(new))}"
    differing = config.differing(settings)
    differing.pop("num_experts", None)  # the experts that are new have been said
    if differing:
        said += f"; settings that differ: {', '.join(f'{key} ({old!r} saved)' for key, (_, old) in differing.items())}"
    return said


def _opened(folder: Path) -> Any:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"init_from: {path}: can't be read: {error}") from error


def _finite_shape(tensor: Tensor, where: str) -> list[int]:
    if not tensor.isfinite().all():
        raise InputError(f"init_from: {where} has numbers that are not finite")
    return list(tensor.shape)


def _may_grow(name: str, saved: list[int], wanted: list[int]) -> bool:
    return _parameter(name) in _OF_EXPERTS and saved[1:] == wanted[1:] and saved[0] < wanted[0]


def _parameter(name: str) -> str:
    """The part of a tensor's name that says which parameter of its layer it is."""
    parts = name.split(".")
    return next((part for part in parts if part.startswith("hycam_")), ".".join(parts[-2:]))
