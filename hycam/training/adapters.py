"""An adapter's folder, checked against the backbone that it is to be loaded into, before any weight of that is."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel

from hycam.errors import InputError
from hycam.training.backbone import build_model
from hycam.training.recipe import BackboneConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_SHARDS_FILE = f"{WEIGHTS_FILE}.index.json"


def read_adapter_config(folder: Path) -> PeftConfig:
    """The settings of the adapter in a folder. Raises `InputError` where they can't be read."""
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except InputError as error:
        raise InputError(f"--adapter: {folder / CONFIG_FILE}: {str(error).removeprefix(f'{CONFIG_FILE}: ')}") from error
    except Exception as error:  # PEFT's kinds are as many as the ways in which its file can be broken
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--adapter: {folder / CONFIG_FILE}: not an adapter's settings: {reason}") from error
    if not hasattr(config, "base_model_name_or_path"):
        raise InputError(f"--adapter: {folder / CONFIG_FILE}: not an adapter's settings: {type(config).__name__}")
    return config


def check_adapter(folder: Path, backbone: BackboneConfig, config: PretrainedConfig, backbone_name: str) -> None:
    """Raise `InputError` unless the adapter in a folder is whole, and is one of this backbone.

    Its tensors must be those that its settings make of the backbone, by name and shape, and have finite numbers alone.

    Args:
        folder: with the adapter's settings and weights.
        backbone: the recipe's.
        config, backbone_name: of its architecture, and what it is called in messages.
    """
    settings = read_adapter_config(folder)
    try:
        model = get_peft_model(build_model(backbone, config), settings)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--adapter: {folder} can't be loaded into {backbone_name}: {reason}") from error
    wanted = {
        name: tuple(tensor.shape)
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    path = folder / WEIGHTS_FILE
    if not path.exists() and (folder / _SHARDS_FILE).exists():
        raise InputError(
            f"--adapter: {folder / _SHARDS_FILE}: weights in several files, which PEFT doesn't read, wanted one file, "
            f"{WEIGHTS_FILE}, as save_pretrained writes it with a max_shard_size that holds them all"
        )
    found = _shapes_of_finite(path)
    flaw = _difference(wanted, found)
    if flaw is not None:
        raise InputError(f"--adapter: {path} can't be loaded into {backbone_name}: {flaw}")


def _difference(wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> str | None:
    """The first difference between the tensors that an adapter's settings make, and those of its file."""
    for name, shape in wanted.items():
        if name not in found:
            return f"it has no {name}, which its {CONFIG_FILE} asks for"
        if found[name] != shape:
            return f"{name} is {list(found[name])}, wanted {list(shape)}"
    for name in found:
        # of LoRAs that were trained beside new tokens, PEFT saves the embeddings too
        if name not in wanted and "embed" not in name and "lm_head" not in name:
            return f"it has {name}, for which its {CONFIG_FILE} does not ask"
    return None


def _shapes_of_finite(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a file's tensors. Raises `InputError` where it can't be read, or has numbers like NaN."""
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (the file is no mapping)
                tensor: Any = file.get_tensor(name)
                if not torch.isfinite(tensor).all():
                    raise InputError(f"--adapter: {path}: {name} has numbers that are not finite")
                shapes[name] = tuple(tensor.shape)
    except (OSError, SafetensorError) as error:
        raise InputError(f"--adapter: {path}: can't be read: {error}") from error
    return shapes


def keeps_dtype(folder: Path, model: PreTrainedModel) -> bool:
    """Whether the weights of the adapter in a folder have the dtype of the model that they are to be loaded into.

    Then they keep it. PEFT would make float32 ones of 16 bits, with which inference rounds elsewhere than training did.
    """
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        return {file.get_tensor(name).dtype for name in file.keys()} == {model.dtype}  # noqa: SIM118 (it is no mapping)
