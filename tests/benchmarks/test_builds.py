"""The record of builds: each target's, with a line for each that has a fault, and the table of all tritons."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from benchmarks import builds
from benchmarks.harness.pages import NOT_MEASURED
from benchmarks.harness.versions import builds as table


class Launch(SimpleNamespace):
    def description(self):
        return {"dtype": "bf16"}


def test_faults_are_named_and_end_nothing(tmp_path, monkeypatch, capsys):
    def build(launch, target):
        if launch.name == "broken":
            raise RuntimeError("no layout")
        return launch.name

    launches = [Launch(name=name) for name in ("whole", "spilling", "broken")]
    monkeypatch.setattr(builds, "families", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(
        builds, "record", lambda target: SimpleNamespace(launches=launches[: 3 if target == "sm_90" else 1])
    )
    monkeypatch.setattr(builds, "one_of_each_configuration", lambda launches: launches)
    monkeypatch.setattr(builds, "build", build)
    monkeypatch.setattr(builds, "fault", lambda row: "8 bytes are spilled" if row == "spilling" else None)
    assert builds.main(["--out", str(tmp_path / "triton-9.json")]) == 1
    record = json.loads((tmp_path / "triton-9.json").read_text())
    assert [(entry["target"], entry["builds"]) for entry in record["entries"]] == [("sm_80", 1), ("sm_90", 3)]
    assert record["entries"][0]["faults"] == []
    assert record["entries"][1]["faults"] == [
        "spilling {'dtype': 'bf16'}: 8 bytes are spilled",
        "broken {'dtype': 'bf16'}: RuntimeError: no layout",
    ]
    assert "spilling" in capsys.readouterr().out
    launches[1:] = []
    assert builds.main(["--out", str(tmp_path / "triton-9.json")]) == 0


def test_the_table_has_a_row_for_each_triton(tmp_path):
    assert table(tmp_path) == NOT_MEASURED
    for version, faults in {"3.10.0": [], "3.9.0": ["a fault"]}.items():
        entries = [{"target": "sm_80", "builds": 60, "faults": []}, {"target": "sm_90", "builds": 62, "faults": faults}]
        (tmp_path / f"triton-{version}.json").write_text(json.dumps({"triton": version, "entries": entries}))
    assert table(tmp_path).splitlines()[::2] == ["| triton | sm_80 | sm_90 |", "| 3.9.0 | 60, 0 | 62, 1 |"]
    assert table(tmp_path).splitlines()[3] == "| 3.10.0 | 60, 0 | 62, 0 |"
