"""What a report says of a machine: its versions and its accelerators, of whatever vendor."""

import sys
from types import SimpleNamespace

import pytest
import torch

from hycam.environment import devices, package_versions


@pytest.mark.parametrize("name", ["triton-windows", "triton-rocm"])
def test_a_triton_of_another_name_is_told(name, tmp_path, monkeypatch):
    metadata = tmp_path / f"{name.replace('-', '_')}-3.6.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 3.6.0\n")
    (metadata / "top_level.txt").write_text("triton\n")
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    assert package_versions()["triton"] == f"3.6.0 ({name})"


def test_without_a_triton_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    assert package_versions()["triton"] is None


PROPERTIES = SimpleNamespace(name="a GPU", total_memory=48 << 30, major=9, minor=4)
SHOWN = {"name": "a GPU", "memory_gib": 48.0}


@pytest.mark.parametrize(
    ("kind", "module", "shown"),
    [
        ("cuda", SimpleNamespace(get_device_properties=lambda index: PROPERTIES), SHOWN | {"capability": "9.4"}),
        ("xpu", SimpleNamespace(get_device_properties=lambda index: PROPERTIES), SHOWN),
        ("mps", SimpleNamespace(), {"name": "mps"}),
    ],
)
def test_accelerators_of_every_kind_are_told(kind, module, shown, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert devices()[1:] == [{"device": f"{kind}:{index}", **shown} for index in range(2)]
