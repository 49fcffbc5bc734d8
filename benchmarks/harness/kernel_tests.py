"""The kernel tests on the device, in parallel processes, within a time limit."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.harness.processes import wait
from benchmarks.harness.record import ROOT, Entry

FOLDER = ROOT / "tests" / "kernels"
# they build for every target, and break copies of the sources: neither needs the device
_WITHOUT_DEVICE = ("test_aot.py", "test_planted_faults.py")
_NOTHING_COLLECTED = 5
# seconds for an interrupted process to report
_GRACE = 8.0


def run_tests(seconds: float, log: Path, *, processes: int, folder: Path = FOLDER) -> Entry:
    """Run the tests of a folder, those that need triton in shards: counts, failures with their last lines, and whether
    all passed.

    All passed means: every process ended in time with pytest's success and its report, and at least one test ran. A
    shard may be empty. A process that is out of time is interrupted, so that it reports what it has run.
    """
    triton_folder = folder / "backends" / "triton"
    jobs: list[tuple[Sequence[str | Path], str]] = []
    if triton_folder.exists():
        ignored = [f"--ignore={triton_folder / name}" for name in _WITHOUT_DEVICE]
        jobs += [([triton_folder, *ignored], f"{index}/{processes}") for index in range(processes)]
    jobs.append(([folder, f"--ignore={triton_folder}"], "0/1"))
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        reports = [Path(scratch, f"{index}.xml") for index in range(len(jobs))]
        outputs = [Path(scratch, f"{index}.log") for index in range(len(jobs))]
        running = [_start(*job, report, output) for job, report, output in zip(jobs, reports, outputs, strict=True)]
        codes, in_time = _finish(running, start + seconds)
        log.write_text("\n".join(output.read_text(errors="replace") for output in outputs))
        reported = [report for report, code in zip(reports, codes, strict=True) if code is not None and report.exists()]
        counts = _count(reported)
    ended = set(codes) <= {0, _NOTHING_COLLECTED} and reported == reports
    passed = in_time and ended and counts["passed"] > 0 and not counts["failures"]
    return {"passed_all": passed, "in_time": in_time, "seconds": round(time.monotonic() - start, 1)} | counts


def _start(paths: Sequence[str | Path], shard: str, report: Path, output: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "benchmarks.harness.shard", "--maxfail=20"]
    command += [f"--junitxml={report}", "-p", "no:cacheprovider", *map(str, paths)]
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ |= {"HYCAM_SHARD": shard, "PYTHONPATH": os.pathsep.join([str(ROOT), environ.get("PYTHONPATH", "")])}
    # the processes share the cores; threads that spin while they wait would starve each other
    environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with output.open("w") as stream:
        return subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )


def _finish(running: Sequence[subprocess.Popen], end: float) -> tuple[list[int | None], bool]:
    """Exit statuses, None of what had to be killed at ``end``; and whether none had to be interrupted before."""
    for process in running:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(end - _GRACE - time.monotonic(), 0.1))
    late = [process for process in running if process.poll() is None]
    for process in late:
        os.killpg(process.pid, signal.SIGINT)
    return [wait(process, end) for process in running], not late


def _count(reports) -> Entry:
    passed = skipped = 0
    failures = []
    last_lines = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            outcomes = {child.tag for child in case}
            if outcomes & {"failure", "error"}:
                name = f"{case.get('classname')}::{case.get('name')}"
                failures.append(name)
                text = "\n".join(child.text or "" for child in case).strip()
                last_lines[name] = text.splitlines()[-1] if text else ""
            elif "skipped" in outcomes:
                skipped += 1
            else:
                passed += 1
    return {"passed": passed, "skipped": skipped, "failures": failures, "last_lines": last_lines}
