"""`hycam env`."""

import json
from argparse import Namespace

import torch
from rich.table import Table

from hycam.commands.tables import show
from hycam.environment import devices, package_versions
from hycam_kernels import explain_backend

# A call of the op with the paper's E and r on a narrow model.
_TOKENS, _HIDDEN, _EXPERTS, _RANK = 16, 1024, 5, 64


def run(options: Namespace) -> None:
    versions, found, backends = package_versions(), devices(), backend_choices()
    if options.json:
        print(json.dumps({"versions": versions, "devices": found, "backends": backends}, indent=2))
        return
    packages = Table("package", "version", title="versions")
    for package, version in versions.items():
        packages.add_row(package, version or "not installed")
    machine = Table("device", "name", "details", title="devices")
    for device in found:
        details = ", ".join(f"{key} {value}" for key, value in device.items() if key not in ("device", "name"))
        machine.add_row(device["device"], device["name"], details)
    choices = Table("device", "dtype", "backend of the op, and why", title="hycam_modulation")
    for choice in backends:
        choices.add_row(choice["device"], choice["dtype"], choice["backend"])
    show(packages, machine, choices)


def backend_choices() -> list[dict[str, str]]:
    """What `backend="auto"` picks per device and dtype."""
    names = [device["device"] for device in devices()[1:]] or ["cpu"]
    return [
        {"device": name, "dtype": str(dtype).removeprefix("torch."), "backend": _explain(torch.device(name), dtype)}
        for name in names
        for dtype in (torch.bfloat16, torch.float32)
    ]


def _explain(device: torch.device, dtype: torch.dtype) -> str:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    return explain_backend(
        zeros(_TOKENS, _HIDDEN),
        zeros(_TOKENS, _HIDDEN),
        zeros(_HIDDEN, _HIDDEN),
        zeros(_EXPERTS, _RANK, _HIDDEN),
        zeros(_EXPERTS, _RANK, _RANK),
        zeros(_EXPERTS, _HIDDEN, _RANK),
        zeros(_EXPERTS, _HIDDEN),
    )
