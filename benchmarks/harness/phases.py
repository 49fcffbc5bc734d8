"""The phases of a machine's ten minutes, in order, each a process within what is left of the time.

One record holds it all, and whichever process runs writes it: whenever a run is killed, what was measured is there.
"""

from collections.abc import Callable
from pathlib import Path

from benchmarks.harness.record import Budget, Entry, Record
from hycam_kernels.backends.triton.config_tables import INTERPRETER, families

# seconds that stay for the times and the models, whatever the phases before them take; and for a process to end when
# its own are over
TIMES_SHARE, MODELS_SHARE, MARGIN = 170, 90, 12
TESTS_LIMIT, CANDIDATES_LIMIT = 190, 110

# by phase, in their order: the seconds that it may take of those that are left
PHASES: dict[str, Callable[[float], float]] = {
    "candidates": lambda left: min(CANDIDATES_LIMIT, left - TIMES_SHARE - MODELS_SHARE),
    "times": lambda left: left - MODELS_SHARE,
    "models": lambda left: left - MARGIN,
}
Launch = Callable[[str, float], int | None]


class OtherSourcesError(ValueError):
    """A folder has a record of other sources."""


def orchestrate(out: Path, header: Entry, budget: Budget, test: Callable[[float], Entry], launch: Launch) -> bool:
    """The phases in order, each within what is left. True if tests passed and times were taken.

    What an earlier run left in ``out`` is removed first: its table and entries are not this run's.

    Args:
        test: (seconds) -> the tests' entry, as `run_tests`.
        launch: (phase, seconds) -> exit status, None where it had to be stopped; the phase's process goes on with the
            record by `enter`.
    """
    path = out / "record.json"
    for left in (path, *tables(out)):
        left.unlink(missing_ok=True)
    record = Record(path, header | {"phases": {}})
    passed = _run_tests(record, min(TESTS_LIMIT, budget.left - TIMES_SHARE - MODELS_SHARE), test)
    for name, limit in PHASES.items():
        seconds = limit(budget.left)
        if seconds <= MARGIN:
            _note(record, name, _skipped(seconds))
            continue
        _note(record, name, "started")
        status = launch(name, seconds)
        record = Record.read(path)
        _note(record, name, {0: "done", None: "out of time"}.get(status, f"failed with exit status {status}"))
    return passed and any(
        entry["group"] == "op" and entry.get("peer") == "fused" and "samples_us" in entry for entry in record.entries
    )


def _run_tests(record: Record, seconds: float, test: Callable[[float], Entry]) -> bool:
    if seconds <= MARGIN:
        _note(record, "tests", _skipped(seconds))
        return False
    _note(record, "tests", "started")
    tests = test(seconds)
    record.add({"group": "tests"} | tests)
    _note(record, "tests", "passed" if tests["passed_all"] else "failed" if tests["in_time"] else "out of time")
    # what failed withholds nothing: each peer is compared with the reference before it is timed, and refused alone
    for failure in tests["failures"]:
        print(f"{failure}: {tests['last_lines'].get(failure, '')}")
    return tests["passed_all"]


def _note(record: Record, phase: str, outcome: str) -> None:
    record.content["phases"][phase] = outcome
    record.write()


def _skipped(seconds: float) -> str:
    return f"skipped: {max(seconds, 0):.0f} s were left for it, {MARGIN} s are for its end"


def enter(out: Path, phase: str, header: Entry) -> Record:
    """The folder's record, for the process of a phase to add to; a new one where there is none.

    Entries of an earlier attempt at this phase go: the new ones take their place.

    Raises:
        OtherSourcesError: the record there is of another commit.
    """
    path = out / "record.json"
    record = Record.read(path) if path.exists() else Record(path, header | {"phases": {}})
    there, here = record.content["git"]["commit"], header["git"]["commit"]
    if there != here:
        raise OtherSourcesError(f"{path} is of commit {there}, these sources are {here}: give another folder")
    record.content["entries"] = [entry for entry in record.entries if entry.get("phase") != phase]
    record.labels = {"phase": phase}
    _note(record, phase, "started")
    return record


def leave(record: Record, phase: str) -> None:
    """Note that a phase is done."""
    _note(record, phase, "done")


def tables(out: Path) -> list[Path]:
    """The tables of block sizes in a folder."""
    return [path for name in (*families(), INTERPRETER) if (path := out / f"{name}.json").exists()]
