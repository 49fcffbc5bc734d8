"""Versions and devices of this machine, for `hycam env` and the record of a run."""

import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch

_PACKAGES = (
    "hycam-kernels",
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "deepspeed",
    "flash-attn",
    "liger-kernel",
    "bitsandbytes",
    "torchao",
)


def package_versions() -> dict[str, str | None]:
    """Installed version of every package that a result depends on, None for one that is absent."""
    versions = {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}
    return versions | {"triton": versions["triton"] or _other_triton()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _other_triton() -> str | None:
    """Version and name of the package that brings the module triton: one of another name for AMD, Intel and Windows."""
    if importlib.util.find_spec("triton") is None:
        return None
    names = importlib.metadata.packages_distributions().get("triton", [])
    return ", ".join(f"{importlib.metadata.version(name)} ({name})" for name in names) or None


def devices() -> list[dict[str, Any]]:
    """The CPU and every accelerator: name, and memory in GiB where the accelerator tells it."""
    found: list[dict[str, Any]] = [
        {"device": "cpu", "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    ]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return found
    for index in range(torch.accelerator.device_count()):
        device = torch.device(accelerator.type, index)
        entry: dict[str, Any] = {"device": str(device), "name": accelerator.type}
        module = torch.get_device_module(device)
        if hasattr(module, "get_device_properties"):
            properties = module.get_device_properties(index)
            entry |= {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
            if accelerator.type == "cuda":
                entry["capability"] = f"{properties.major}.{properties.minor}"
        found.append(entry)
    return found
