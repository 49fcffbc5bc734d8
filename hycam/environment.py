"""Versions and devices of this machine, for `hycam env` and the record of a run."""

import importlib.metadata
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
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[dict[str, Any]]:
    """The CPU and every accelerator: name and memory in GiB."""
    found: list[dict[str, Any]] = [
        {"device": "cpu", "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return found
