"""Processes that lead groups of their own: stopped in time, and never outliving who started them."""

import os
import signal
import subprocess
import threading
import time


def wait(process: subprocess.Popen, end: float) -> int | None:
    """Exit status of the leader of a process group; None where the group had to be stopped at ``end``."""
    try:
        return process.wait(max(end - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        return None
    finally:  # also where the wait is interrupted from the keyboard, which such a group doesn't hear
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def end_with(parent: int) -> None:
    """Kill this process and its group, which it leads, within a second of the end of the one that started it.

    Whatever ends that one, even what it can't answer: the device and the record are free for the next run.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
