"""The record of builds: each target's, with a line for each fault, and the table of all tritons."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from benchmarks import builds
from benchmarks.harness.pages import NOT_MEASURED
from benchmarks.harness.versions import builds as table
from hycam_kernels.backends.triton import offline_builds
from hycam_kernels.backends.triton.launch import COMPILER_OPTIONS


class Launch(SimpleNamespace):
    def description(self):
        return {"dtype": "bf16"}


def test_faults_are_named_and_end_nothing(tmp_path, monkeypatch, capsys):
    def build(launch, target):
        if launch.name == "broken":
            raise RuntimeError("no layout")
        return launch.name

    launches = [Launch(name=name) for name in ("whole", "spilling", "broken")]
    again = Launch(name="of a configuration that is there already")
    of_target = {"sm_80": (launches[:1], []), "sm_90": ([*launches, again], [("v_grad", 3)])}

    def record(target):
        launches, unused = of_target[target]
        return SimpleNamespace(launches=launches, unused_rows=lambda: unused)

    monkeypatch.setattr(builds, "families", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(offline_builds, "record", record)
    monkeypatch.setattr(
        offline_builds, "one_of_each_configuration", lambda found: [each for each in found if each is not again]
    )
    monkeypatch.setattr(offline_builds, "build", build)
    monkeypatch.setattr(offline_builds, "fault", lambda row: "spills 8 bytes" if row == "spilling" else None)
    assert builds.main(["--out", str(tmp_path / "triton-9.json")]) == 1
    entries = json.loads((tmp_path / "triton-9.json").read_text())["entries"]
    assert [(entry["target"], entry["builds"]) for entry in entries] == [("sm_80", 1), ("sm_90", 2)]
    assert [entry["faults"] for entry in entries] == [
        [],
        [
            "sm_90 v_grad: no call uses row 3",
            "sm_90 spilling {'dtype': 'bf16'}: spills 8 bytes",
            "sm_90 broken {'dtype': 'bf16'}: RuntimeError: no layout",
        ],
    ]
    assert "spilling" in capsys.readouterr().out
    of_target["sm_90"] = (launches[:1], [])
    assert builds.main(["--out", str(tmp_path / "triton-9.json")]) == 0


def test_builds_ask_for_the_arithmetic_of_launches(monkeypatch):
    """Fused multiply-adds, which triton 3.10 leaves off by default."""
    asked = []

    def compile_(source, target, options):
        asked.append(options)
        raise InterruptedError

    monkeypatch.setattr(offline_builds.triton, "compile", compile_)
    launch = next(iter(offline_builds.record("sm_90").launches))
    with pytest.raises(InterruptedError):
        offline_builds.compile_launch(launch, "sm_90")
    assert asked == [dict(launch.options) | COMPILER_OPTIONS]


def test_the_table_has_a_row_for_each_triton(tmp_path):
    assert table(tmp_path) == NOT_MEASURED
    for version, faults in {"3.10.0": [], "3.9.0": ["a fault"]}.items():
        entries = [{"target": "sm_80", "builds": 60, "faults": []}, {"target": "sm_90", "builds": 62, "faults": faults}]
        (tmp_path / f"triton-{version}.json").write_text(json.dumps({"triton": version, "entries": entries}))
    assert table(tmp_path).splitlines()[::2] == ["| triton | sm_80 | sm_90 |", "| 3.9.0 | 60, 0 | 62, 1 |"]
    assert table(tmp_path).splitlines()[3] == "| 3.10.0 | 60, 0 | 62, 0 |"
