"""Backbones whose linear layers are quantised while they are loaded, through transformers' own configurations."""

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from hycam.errors import InputError
from hycam.training.recipe import BackboneConfig

_PACKAGES = {"bnb": "bitsandbytes", "torchao": "torchao"}


def check_quantization(name: str) -> None:
    """Raise `InputError` where the package that quantises is missing."""
    package = _PACKAGES[name.partition("-")[0]]
    if importlib.util.find_spec(package) is None:
        wanted = "pip install 'hycam-kernels[quantization]'"
        raise InputError(f"backbone.quantization: got {name}, but {package} is not installed, wanted: {wanted}")


def quantization_config(config: BackboneConfig) -> BitsAndBytesConfig | TorchAoConfig:
    """What `from_pretrained` takes as `quantization_config`."""
    if config.quantization == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if config.quantization == "bnb-4bit":
        # products in the backbone's dtype: in bfloat16 unless another one is named
        dtype = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from torchao import quantization

    kinds: dict[str | None, Any] = {
        "torchao-int8": quantization.Int8WeightOnlyConfig,
        "torchao-float8": quantization.Float8WeightOnlyConfig,
    }
    return TorchAoConfig(quant_type=kinds[config.quantization]())
