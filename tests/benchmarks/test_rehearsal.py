"""The whole of `make gpu` with a fake device: what a run leaves, whether it ends, is killed, or has too little time."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.end_to_end import STEP_METHODS
from benchmarks.gpu import COMPILE_SECONDS, OUR_PEERS, RELEASED_PEERS
from benchmarks.harness.pages import NOT_MEASURED
from benchmarks.harness.phases import PHASES
from benchmarks.harness.plots import outdated, redraw
from benchmarks.harness.record import ROOT
from benchmarks.harness.tables import TABLES, render, sources
from hycam_kernels.backends.triton.config_tables import OPTIONAL

pytest.importorskip("triton")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

MEASURED = ("samples_us", "median_us", "floor_us", "kept_bytes", "longest_tokens", "passed_all")
REASONS = ("skipped", "refusal", "error", "wrong")


@contextmanager
def rehearsal(out: Path, *options: str) -> Iterator[subprocess.Popen]:
    """The command, started; it is gone after the block. It is of one commit, whatever is committed meanwhile."""
    if "--commit" not in options:
        options += "--commit", "abc"
    scratch = out.parent / "scratch"
    environ = os.environ | {
        "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)
    }  # fmt: skip
    for folder in (out, scratch):
        folder.mkdir(exist_ok=True)
    with (out / "printed").open("w") as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.rehearsal", "--out", str(out), *options],
            cwd=ROOT, env=environ, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def out(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def run(out: Path, *options: str) -> int:
    with rehearsal(out, *options) as process:
        return process.wait()


def read(out: Path) -> dict:
    return json.loads((out / "record.json").read_text())


def measured(record: dict, **wanted) -> list[dict]:
    return [
        entry
        for entry in record["entries"]
        if any(entry.get(name) is not None for name in MEASURED)
        and all(entry.get(name) == value for name, value in wanted.items())
    ]


def drawn(out: Path, folder: Path) -> set[str]:
    """Names of the GPU's tables that the record fills; all of them are drawn, and the plots."""
    results = folder / "results"
    (results / "rehearsal").mkdir(parents=True)
    shutil.copy(out / "record.json", results / "rehearsal" / "2026-01-01.json")
    plots = sources("gpu-plots", results)
    redraw(plots, folder / "plots")
    assert not outdated(plots, folder / "plots")
    pages = {name: render(name, results) for name in TABLES if name.startswith("gpu-")}
    for file in pages["gpu-plots"].split("(plots/")[1:]:
        assert (folder / "plots" / file.partition(")")[0]).exists()
    return {name for name, page in pages.items() if NOT_MEASURED not in page}


def test_a_whole_run(out, tmp_path):
    """Every phase, group and peer is there, what isn't says why, and the pages are drawn from it."""
    status = run(out, "--seconds", "1200")  # the interpreter on a busy machine
    assert status == 0, (out / "printed").read_text() + (out / "tests.log").read_text()
    record = read(out)
    candidates = record["phases"]["candidates"]
    assert record["phases"] == {"tests": "passed", "candidates": candidates, "times": "done", "models": "done"}
    assert candidates in ("done", "out of time")  # it has its own limit, too short for a very busy machine
    assert record["gpu"]["name"] == "rehearsal"
    assert record["gpu_after"]
    assert {entry.get("phase") for entry in record["entries"]} == {None, *PHASES}

    assert {entry["group"] for entry in measured(record)} == {
        "tests", "structure", "candidate", "rate", "floor", "op", "memory", "decode", "overhead", "kernel", "sweep",
        "step", "generation", "attention", "longest",
    }  # fmt: skip
    for peer in (*OUR_PEERS, *RELEASED_PEERS):
        entries = measured(record, group="op", peer=peer)
        assert {entry["pass"] for entry in entries} == {"forward", "backward", "both"}
        assert {entry["method"] for entry in entries} == {"graph", "events"}
    assert {entry["peer"] for entry in record["entries"] if entry["group"] == "op"} >= COMPILE_SECONDS.keys()
    for group in ("step", "longest"):
        assert {entry["peer"] for entry in measured(record, group=group)} == set(STEP_METHODS)

    for entry in record["entries"]:
        assert any(entry.get(name) is not None for name in (*MEASURED, *REASONS)), entry
        assert "wrong" not in entry, entry
        # compilers know nothing of the fake
        assert "error" not in entry or entry.get("peer") in COMPILE_SECONDS, entry
    assert any(entry["group"] == "candidate" and entry.get("median_us") for entry in record["entries"])

    assert record["table"] == "tuned"
    table = json.loads((out / "interpreter.json").read_text())
    shipped = ROOT / "hycam_kernels" / "backends" / "triton" / "configs" / "interpreter.json"
    assert table.keys() >= json.loads(shipped.read_text()).keys() - set(OPTIONAL)

    assert drawn(out, tmp_path) == {name for name in TABLES if name.startswith("gpu-")}


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_alone(phase, out):
    """Within its seconds, into a record of its own."""
    assert run(out, "--phase", phase, "--seconds", "15") == 0
    record = read(out)
    assert record["phases"] == {phase: "done"}
    assert record["table"] == "shipped"
    assert record["git"] == {"commit": "abc", "dirty": False}
    assert record["entries"]
    assert {entry["phase"] for entry in record["entries"]} == {phase}
    assert any("skipped" in entry for entry in record["entries"])
    assert run(out, "--phase", phase, "--commit", "def") == 2
    assert "commit abc, these sources are def: give another folder" in (out / "printed").read_text()


def test_a_phase_alone_takes_the_table_that_lies_there(out):
    """One that can't be taken is named by every peer that needs it."""
    (out / "interpreter.json").write_text("{}")
    assert run(out, "--phase", "times", "--seconds", "20") == 0
    record = read(out)
    assert record["table"] == "tuned"
    errors = [entry["error"] for entry in record["entries"] if entry.get("peer") == "fused"]
    assert errors
    assert all(f"{out / 'interpreter.json'} has no router" in error for error in errors)


def processes_of(folder: Path) -> list[str]:
    """Commands that are running with files of the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended
            continue
        if str(folder) in command:
            found.append(command)
    return found


Moment = Callable[[dict], bool]
# (seconds of the run, which phase gets them, when it is killed, what is measured by then)
MOMENTS: dict[str, tuple[int, str, Moment, str | None]] = {
    "the tests begin": (560, "tests", lambda record: True, None),
    "candidates have times": (
        560, "candidates", lambda record: len(measured(record, group="candidate")) > 3, "candidate"
    ),
    "the times begin": (170, "times", lambda record: True, None),
    "the op has times": (170, "times", lambda record: len(measured(record, group="op")) > 3, "op"),
    "the models begin": (101, "models", lambda record: True, None),
    "a step has times": (101, "models", lambda record: bool(measured(record, group="step")), "step"),
}  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_leaves_all_that_it_measured(moment, tmp_path, out):
    """In the record itself, from which pages are drawn and other phases go on; no process goes on."""
    seconds, phase, reached, group = MOMENTS[moment]
    with rehearsal(out, "--seconds", str(seconds)) as process:
        while True:
            seen = read(out) if (out / "record.json").exists() else {"phases": {}}
            if seen["phases"].get(phase) == "started" and reached(seen):
                break
            assert process.poll() is None, (out / "printed").read_text()
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
    end = time.monotonic() + 60  # one that was starting hears of it when it has imported
    while still_there := processes_of(tmp_path):
        assert time.monotonic() < end, still_there
        time.sleep(0.2)
    record = read(out)
    assert record["entries"][: len(seen["entries"])] == seen["entries"]
    assert record["phases"] == seen["phases"]
    assert list(record["phases"])[-1] == phase
    assert group is None or measured(record, group=group, phase=phase)
    tables = drawn(out, tmp_path)
    assert ("gpu-op" in tables, "gpu-steps" in tables) == (group == "op", group == "step")

    assert run(out, "--phase", "models", "--seconds", "5") == 0
    later = read(out)
    assert later["phases"] == record["phases"] | {"models": "done"}
    of_others = [entry for entry in record["entries"] if entry.get("phase") != "models"]
    assert later["entries"][: len(of_others)] == of_others
    assert len(later["entries"]) > len(of_others)


def test_what_a_short_time_leaves_out_is_named(out):
    """37 seconds are none for tests, candidates and times, and too few to measure a model."""
    with rehearsal(out, "--seconds", "37") as process:
        while not (out / "record.json").exists():
            time.sleep(0.1)
        start = time.monotonic()
        assert process.wait() == 1
        assert time.monotonic() - start < 37
    record = read(out)
    for phase in ("tests", "candidates", "times"):
        assert record["phases"][phase].startswith("skipped: 0 s were left")
    # a very busy machine takes all of them to start
    assert record["phases"]["models"] in ("done", "out of time")
    for group in ("step", "longest"):
        entries = [entry for entry in record["entries"] if entry["group"] == group]
        assert entries or record["phases"]["models"] == "out of time"
        assert all("needed" in entry["skipped"] for entry in entries)
    assert (out / "printed").read_text().endswith(json.dumps(record["phases"], indent=1) + "\n")
