"""The phases of a machine's ten minutes, in order, each a process within what is left of the time."""

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness.record import Budget, Entry, Record

# seconds that stay for the times and the models, whatever the phases before them take; and for starting and ending a
# process
TIMES_SHARE, MODELS_SHARE, MARGIN = 170, 90, 12
TESTS_LIMIT, CANDIDATES_LIMIT = 190, 110

# by phase, in their order: the seconds that it may take of those that are left
PHASES: dict[str, Callable[[float], float]] = {
    "candidates": lambda left: min(CANDIDATES_LIMIT, left - TIMES_SHARE - MODELS_SHARE),
    "times": lambda left: left - MODELS_SHARE,
    "models": lambda left: left - MARGIN,
}
Launch = Callable[[str, float, dict[str, str]], int | None]


def orchestrate(out: Path, header: Entry, budget: Budget, test: Callable[[float], Entry], launch: Launch) -> bool:
    """The phases in order, each within what is left; ``record.json`` is complete after each. True if tests passed and
    times were taken.

    What an earlier run left in ``out`` is removed first: its table and entries are not this run's.

    Args:
        test: (seconds) -> the tests' entry, as `run_tests`.
        launch: (phase, seconds, environment) -> exit status, None where it had to be stopped.
    """
    for left in (*out.glob("sm_*.json"), *(out / f"{name}.json" for name in ("record", *PHASES))):
        left.unlink(missing_ok=True)
    record = Record(out / "record.json", header)
    phases: dict[str, str] = {}
    record.content["phases"] = phases
    tests = test(min(TESTS_LIMIT, budget.left - TIMES_SHARE - MODELS_SHARE))
    record.add({"group": "tests"} | tests)
    phases["tests"] = "passed" if tests["passed_all"] else "failed" if tests["in_time"] else "out of time"
    # what failed withholds nothing: each peer is compared with the reference before it is timed, and refused alone
    for failure in tests["failures"]:
        print(f"{failure}: {tests['last_lines'].get(failure, '')}")
    for name, limit in PHASES.items():
        seconds = limit(budget.left)
        if seconds <= MARGIN:
            phases[name] = f"skipped: {seconds:.0f} s were left"
            record.write()
            continue
        tuned = any(out.glob("sm_*.json"))
        status = launch(name, seconds, {"HYCAM_KERNELS_TABLES": str(out)} if tuned and name != "candidates" else {})
        phases[name] = {0: "done", None: "out of time"}.get(status, f"failed with exit status {status}")
        phase_file = out / f"{name}.json"
        if phase_file.exists():
            record.entries.extend(json.loads(phase_file.read_text())["entries"])
        record.content["table"] = "tuned" if tuned else "shipped"
        record.write()
    return tests["passed_all"] and any(
        entry["group"] == "op" and entry.get("peer") == "fused" and "samples_us" in entry for entry in record.entries
    )
