"""Processes of a run end in time, and with who started them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.harness.processes import wait
from benchmarks.harness.record import ROOT

# a leader that starts another process of its group, and says that one's number
LEADER = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
# what starts a process that ends with it, and ends itself when it is told to
STARTER = f"""
import os, subprocess, sys
started = 'import os, sys; from benchmarks.harness.processes import end_with; end_with(int(sys.argv[1])); ' + {LEADER!r}
process = subprocess.Popen([sys.executable, '-c', started, str(os.getpid())], start_new_session=True)
sys.stdin.read()
"""


def is_gone(pid: int) -> bool:
    """A process that nobody waits for has ended, too."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def comes_true(condition, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def start(code: str, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT, **options)


def test_a_group_that_is_out_of_time_is_stopped_whole():
    process = start(LEADER, start_new_session=True)
    other = int(process.stdout.readline())
    assert wait(process, time.monotonic() + 0.1) is None
    assert process.returncode == -signal.SIGKILL
    assert comes_true(lambda: is_gone(other))
    process.stdout.close()


def test_the_keyboard_stops_what_is_waited_for():
    process = start(LEADER, start_new_session=True)
    process.stdout.readline()
    plain = process.wait

    def interrupted(timeout=None):
        process.wait = plain
        raise KeyboardInterrupt

    process.wait = interrupted
    with pytest.raises(KeyboardInterrupt):
        wait(process, time.monotonic() + 60)
    assert process.returncode == -signal.SIGKILL
    process.stdout.close()


def test_what_ended_has_its_status():
    assert wait(start("import sys; sys.exit(3)", start_new_session=True), time.monotonic() + 60) == 3


def test_a_group_ends_with_who_started_it():
    """Though that one is killed, and in a group of its own."""
    starter = start(STARTER, stdin=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
    started = int(starter.stdout.readline())
    assert not is_gone(started)
    starter.kill()
    starter.communicate()
    assert comes_true(lambda: is_gone(started))
