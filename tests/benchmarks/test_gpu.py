"""The GPU command's phases: a failed test is named and no success, everything ends in time, all is recorded."""

import itertools
import json
import os
import time
from functools import partial

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import main, run_phase
from benchmarks.harness.kernel_tests import run_tests
from benchmarks.harness.phases import MARGIN, MODELS_SHARE, TIMES_SHARE, OtherSourcesError, enter, orchestrate, tables
from benchmarks.harness.record import Budget, Record
from benchmarks.op.shapes import SWEEP, TRAINING

PASSED = {"passed_all": True, "in_time": True, "passed": 3, "skipped": 0, "failures": [], "last_lines": {}}
FUSED = {"group": "op", "peer": "fused", "samples_us": [1.0]}


HEADER = {"git": {"commit": "abc", "dirty": False}}


class Phases:
    """Stands for the phases' processes: notes what was started, and adds the entries that a phase would."""

    def __init__(self, folder, **outcomes) -> None:
        self.folder = folder
        self.outcomes = outcomes
        self.started: list[tuple[str, float]] = []

    def __call__(self, name, seconds):
        self.started.append((name, seconds))
        status, entries = self.outcomes.get(name, (0, []))
        record = enter(self.folder, name, HEADER)
        for entry in entries:
            record.add(entry)
        return status


def read(folder) -> dict:
    return json.loads((folder / "record.json").read_text())


def test_all_phases_in_order(tmp_path):
    step = {"group": "step"}
    phases = Phases(tmp_path, candidates=(0, [{"group": "candidate"}]), times=(0, [FUSED]), models=(0, [step]))
    assert orchestrate(tmp_path, HEADER, Budget(560), lambda seconds: PASSED, phases)
    record = read(tmp_path)
    assert [name for name, *_ in phases.started] == ["candidates", "times", "models"]
    assert record["phases"] == {"tests": "passed", "candidates": "done", "times": "done", "models": "done"}
    assert [entry["group"] for entry in record["entries"]] == ["tests", "candidate", "op", "step"]
    assert [entry.get("phase") for entry in record["entries"]] == [None, "candidates", "times", "models"]
    assert record["git"] == HEADER["git"]


@pytest.mark.parametrize(
    ("tests", "status"),
    [
        (PASSED | {"passed_all": False, "failures": ["a::b"], "last_lines": {"a::b": "E  no"}}, "failed"),
        (PASSED | {"passed_all": False, "in_time": True, "passed": 0}, "failed"),
        (PASSED | {"passed_all": False, "in_time": False, "failures": ["a::b"]}, "out of time"),
        (PASSED | {"passed_all": False, "in_time": False}, "out of time"),
    ],
)
def test_failed_tests_are_named_and_leave_the_times_but_no_success(tests, status, tmp_path, capsys):
    phases = Phases(tmp_path, times=(0, [FUSED]))
    assert not orchestrate(tmp_path, HEADER, Budget(560), lambda seconds: tests, phases)
    assert [name for name, *_ in phases.started] == ["candidates", "times", "models"]
    assert read(tmp_path)["phases"]["tests"] == status
    printed = capsys.readouterr().out
    for failure in tests["failures"]:
        assert f"{failure}: {tests['last_lines'].get(failure, '')}" in printed


def test_the_compiler_comes_before_what_can_do_without(tmp_path, monkeypatch):
    """The first shape's times, those of torch.compile beside them, then the kernels alone and the sweep."""
    pytest.importorskip("triton")
    order: list[tuple] = []
    chains = []

    def phase(name, session, *arguments, **_) -> None:
        order.append((name, *arguments[:1]))
        if name != "compiled_phase":
            chains.append(arguments[-1].timers[0].chain)

    for name in ("times_phase", "compiled_phase", "sweep_phase"):
        monkeypatch.setattr(gpu, name, partial(phase, name))
    monkeypatch.setattr("benchmarks.op.kernels.measure_kernels", lambda *_: order.append(("kernels",)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    gpu.times_on_gpu(Record(tmp_path / "r.json", {}), Budget(1), tmp_path)
    assert order == [
        ("times_phase", TRAINING), ("compiled_phase", TRAINING[:1]), ("kernels",), ("sweep_phase", SWEEP),
        ("compiled_phase", TRAINING[1:]),
    ]  # fmt: skip
    assert chains == [8, 8], "the products of a rate follow one another"


@pytest.mark.parametrize("family", ["sm_90", "gfx942"])
def test_a_phase_uses_the_table_that_won(family, tmp_path, monkeypatch):
    """But the search itself, which starts anew."""
    seen = []

    def measure(record, budget, out):
        seen.append((os.environ.get("HYCAM_KERNELS_TABLES"), record.content["table"], tables(out)))

    table = tmp_path / f"{family}.json"
    monkeypatch.setenv("HYCAM_KERNELS_TABLES", "")  # so that it's as before after the test
    monkeypatch.delenv("HYCAM_KERNELS_TABLES")
    for name in ("times", "candidates", "models"):
        table.write_text("{}")
        run_phase(name, tmp_path, 60, "abc", measure)
        monkeypatch.delenv("HYCAM_KERNELS_TABLES", raising=False)
    own = (str(tmp_path), "tuned", [table])
    assert seen == [own, (None, "shipped", []), own]


def test_a_phase_alone_replaces_its_own_entries_and_leaves_the_others(tmp_path):
    for number in (1, 2):
        for name in ("times", "models"):
            run_phase(name, tmp_path, 60, "abc", lambda record, *_, number=number: record.add({"number": number}))
    run_phase("times", tmp_path, 60, "abc", lambda record, *_: record.add({"number": 3}))
    record = read(tmp_path)
    assert record["entries"] == [{"number": 2, "phase": "models"}, {"number": 3, "phase": "times"}]
    assert record["phases"] == {"times": "done", "models": "done"}


def test_a_phase_is_not_added_to_a_record_of_other_sources(tmp_path):
    run_phase("times", tmp_path, 60, "abc", lambda record, *_: record.add({"group": "op"}))
    before = read(tmp_path)
    with pytest.raises(OtherSourcesError, match="commit abc, these sources are def"):
        run_phase("times", tmp_path, 60, "def", lambda *_: None)
    assert read(tmp_path) == before


def test_a_phase_that_dies_leaves_what_it_measured(tmp_path):
    """In the record itself, with the phase named as one that began."""
    held = []

    def measure(record, budget, out):
        record.add(FUSED)
        held.append(read(tmp_path))
        raise RuntimeError("no device any more")

    with pytest.raises(RuntimeError, match="no device"):
        run_phase("times", tmp_path, 60, "abc", measure)
    assert held == [read(tmp_path)]
    assert held[0]["phases"] == {"times": "started"}
    assert held[0]["entries"] == [FUSED | {"phase": "times"}]


def test_the_start_of_a_phase_is_of_its_seconds(tmp_path, monkeypatch):
    """A process that is started is told since when it counts: what it imports may take long."""
    commands, ends, left = [], [], []
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command, **options: commands.append(command))
    monkeypatch.setattr(gpu, "wait", lambda process, end: ends.append(end))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 1000.0)
    gpu._launch(tmp_path, "abc", "benchmarks.gpu")("times", 60.0)
    assert ends == [1060.0]
    (command,) = commands
    assert command[1:3] == ["-m", "benchmarks.gpu"]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda commit: HEADER)
    monkeypatch.setattr(gpu, "end_with", lambda parent: left.append(parent))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 1025.0)
    times = {"times": lambda record, budget, out: left.append(budget.left)}
    assert main(command[3:], measure=times) == 0
    assert left == [os.getpid(), pytest.approx(60 - MARGIN - 25, abs=2)]


def test_a_commit_during_the_run_leaves_its_phases(tmp_path, monkeypatch):
    """They are told which sources the run began with."""
    commands = []

    def orchestrate_one(out, header, budget, test, launch) -> bool:
        Record(out / "record.json", header | {"phases": {}}).write()
        launch("models", 60)
        return True

    monkeypatch.setattr(gpu, "orchestrate", orchestrate_one)
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command, **options: commands.append(command))
    monkeypatch.setattr(gpu, "wait", lambda process, end: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda commit: {"git": {"commit": "abc", "dirty": True}})
    assert main(["--out", str(tmp_path)]) == 0
    (command,) = commands
    assert command[command.index("--commit") + 1] == "abc+"


def test_what_an_earlier_run_left_is_not_of_this_one(tmp_path):
    (tmp_path / "sm_90.json").write_text("{}")
    (tmp_path / "record.json").write_text(json.dumps(HEADER | {"phases": {}, "entries": [FUSED]}))
    (tmp_path / "kept.json").write_text("{}")
    assert not orchestrate(tmp_path, HEADER, Budget(560), lambda seconds: PASSED, lambda *phase: 1)
    assert [entry["group"] for entry in read(tmp_path)["entries"]] == ["tests"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.json", "record.json"]


@pytest.mark.parametrize(("status", "outcome"), [(3, "failed with exit status 3"), (None, "out of time")])
def test_failed_candidates_leave_the_times(status, outcome, tmp_path):
    phases = Phases(tmp_path, candidates=(status, []), times=(0, [FUSED]))
    assert orchestrate(tmp_path, HEADER, Budget(560), lambda seconds: PASSED, phases)
    assert read(tmp_path)["phases"] == {
        "tests": "passed", "candidates": outcome, "times": "done", "models": "done",
    }  # fmt: skip


@pytest.mark.parametrize(
    "entries", [[], [{"group": "op", "peer": "fused", "error": "no"}], [FUSED | {"peer": "eager"}]]
)
def test_a_run_without_times_of_the_fused_op_is_no_success(entries, tmp_path):
    phases = Phases(tmp_path, times=(0, entries))
    assert not orchestrate(tmp_path, HEADER, Budget(560), lambda seconds: PASSED, phases)


def test_every_phase_fits_into_what_is_left(tmp_path):
    now = [0.0]
    phases = Phases(tmp_path, times=(0, [FUSED]))

    def launch(name, seconds):
        now[0] += seconds
        return phases(name, seconds)

    def tests(seconds):
        now[0] += seconds
        return PASSED

    orchestrate(tmp_path, HEADER, Budget(560, clock=lambda: now[0]), tests, launch)
    assert now[0] <= 560
    seconds = dict(phases.started)
    assert seconds["times"] >= TIMES_SHARE
    assert seconds["models"] >= MODELS_SHARE - MARGIN


def test_a_phase_without_time_is_skipped_and_named(tmp_path):
    ticks = itertools.count(0.0, 90.0)
    phases = Phases(tmp_path, times=(0, [FUSED]))
    orchestrate(tmp_path, HEADER, Budget(300, clock=lambda: next(ticks)), lambda seconds: PASSED, phases)
    assert "skipped" in read(tmp_path)["phases"]["candidates"]


def test_without_time_for_the_tests_they_are_skipped_and_named(tmp_path):
    """No process is started that would be stopped at once, and nothing that wasn't tested is a success."""
    phases = Phases(tmp_path, times=(0, [FUSED]))
    assert not orchestrate(tmp_path, HEADER, Budget(200), pytest.fail, phases)
    outcomes = read(tmp_path)["phases"]
    assert outcomes["tests"] == outcomes["candidates"]
    assert outcomes["tests"].startswith("skipped: 0 s were left")
    assert (outcomes["times"], outcomes["models"]) == ("done", "done")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is wanted")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert main(["--out", str(tmp_path)]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


TESTS = {
    "pass": "def test_a(): pass\ndef test_b(): pass\n",
    "fail": "def test_a(): pass\ndef test_b(): assert False\n",
    "skip": "import pytest\n@pytest.mark.skip\ndef test_a(): pass\n",
    "broken": "import no_such_module\n",
    "crash": "import os\ndef test_a(): os._exit(0)\n",
    "marked": "import pytest\nslow = [pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)]\n"
    "@pytest.mark.parametrize('i', range(6))\n@pytest.mark.parametrize('n', [0, *slow])\n"
    "def test_a(i, n): assert not n\n",
    "fail-slow": "import time\ndef test_a(): assert False\ndef test_b(): pass\n"
    "def test_c(): pass\ndef test_d(): time.sleep(60)\n",
    "slow": "import time\ndef test_a(): time.sleep(60)\n",
}


def run_on(folder, plain: str, triton: str, seconds=60.0):
    (folder / "backends" / "triton").mkdir(parents=True)
    (folder / "test_plain.py").write_text(TESTS[plain])
    (folder / "backends" / "triton" / "test_triton.py").write_text(TESTS[triton])
    return run_tests(seconds, folder / "log", processes=3, folder=folder)


def test_kernel_tests_run_once_each_over_the_shards(tmp_path):
    result = run_on(tmp_path, "pass", "pass")
    assert result["passed_all"]
    assert (result["passed"], result["failures"]) == (4, [])
    assert "1 deselected" in (tmp_path / "log").read_text()


def test_shards_are_of_what_the_marks_leave(tmp_path):
    result = run_on(tmp_path, "pass", "marked")
    assert (result["passed"], result["failures"]) == (8, [])
    assert (tmp_path / "log").read_text().count("2 passed") == 4  # of 3 shards, and of the plain tests


def test_what_needs_no_device_is_left_out(tmp_path):
    (tmp_path / "backends" / "triton").mkdir(parents=True)
    for name in ("test_aot.py", "test_planted_faults.py"):
        (tmp_path / "backends" / "triton" / name).write_text(TESTS["fail"])
    (tmp_path / "test_plain.py").write_text(TESTS["pass"])
    assert run_tests(60.0, tmp_path / "log", processes=1, folder=tmp_path)["passed_all"]


@pytest.mark.parametrize(
    ("plain", "triton"), [("fail", "pass"), ("pass", "fail"), ("broken", "pass"), ("skip", "skip"), ("pass", "crash")]
)
def test_kernel_tests_do_not_pass(plain, triton, tmp_path):
    result = run_on(tmp_path, plain, triton)
    assert not result["passed_all"]
    assert result["in_time"]


def test_kernel_tests_are_stopped_in_time(tmp_path):
    start = time.monotonic()
    result = run_on(tmp_path, "slow", "pass", seconds=5)
    assert time.monotonic() - start < 30
    assert not result["passed_all"]
    assert not result["in_time"]


def test_what_failed_before_the_time_was_up_is_reported(tmp_path):
    result = run_on(tmp_path, "pass", "fail-slow", seconds=20)
    assert not result["in_time"]
    assert [name.split("::")[-1] for name in result["failures"]] == ["test_a"]
    assert "AssertionError" in result["last_lines"][result["failures"][0]]
