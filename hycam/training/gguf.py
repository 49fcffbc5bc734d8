"""Backbones that lie in a GGUF file: weights, mostly quantised, with configuration, tokenizer and chat template."""

import importlib.util
from pathlib import Path

import transformers
from transformers.utils import cached_file

from hycam.errors import InputError
from hycam.training.recipe import GGUF_SUFFIX, BackboneConfig
from hycam_kernels.versions import release

# 5.17 takes the token that begins a text for the one that ends it
_OLDEST_TRANSFORMERS = "5.18"


def check_gguf(config: BackboneConfig) -> None:
    """Raise `InputError` where what reads the file is missing or too old, or a file on this machine is missing."""
    given = config.gguf_file or config.name_or_path
    if release(transformers.__version__) < release(_OLDEST_TRANSFORMERS):
        raise InputError(
            f"backbone: {given} is a GGUF file, whose end token transformers {transformers.__version__} reads wrong, "
            f"wanted: pip install 'transformers>={_OLDEST_TRANSFORMERS}'"
        )
    if importlib.util.find_spec("gguf") is None:
        raise InputError(
            f"backbone: {given} is a GGUF file, but gguf is not installed, wanted: pip install 'hycam-kernels[gguf]'"
        )
    assert config.name_or_path is not None
    place = Path(config.name_or_path).expanduser()
    if place.is_dir() or config.gguf_file is None:
        gguf_path(config, config.name_or_path)


def gguf_path(config: BackboneConfig, name: str) -> Path:
    """The file, absolute; one of the hub is fetched into its cache.

    Args:
        name: the folder, hub id or file.

    Raises:
        InputError: where there is no such file.
    """
    place = Path(name).expanduser()
    if config.gguf_file is None:
        if not place.is_file():
            raise InputError(f"backbone.name_or_path: {name}: no such file")
        return place.absolute()
    if place.is_dir():
        file = place / config.gguf_file
        if not file.is_file():
            known = ", ".join(sorted(path.name for path in place.glob(f"*{GGUF_SUFFIX}"))) or "none"
            raise InputError(f"backbone.gguf_file: {file}: no such file; GGUF files there: {known}")
        return file.absolute()
    try:
        found = cached_file(name, config.gguf_file, revision=config.revision or "main")
    except OSError as error:
        reason = next(line.strip() for line in str(error).splitlines() if line.strip())
        raise InputError(f"backbone.gguf_file: {config.gguf_file} of {name}: can't be loaded: {reason}") from error
    assert found is not None
    return Path(found)


def named_gguf(config: BackboneConfig, name: str) -> str:
    """What names the backbone in an adapter's settings: a file's path, which a recipe takes, or a hub id."""
    return str(gguf_path(config, name)) if Path(name).expanduser().exists() else name
