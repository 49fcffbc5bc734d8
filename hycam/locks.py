"""Locks of files that end with the process that holds them, however it ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError as error:
    # without the module's name: the command says the line alone
    raise ImportError(
        "runs and studies lock their folders by flock, which this system hasn't: wanted Linux, macOS, or WSL on Windows"
    ) from error


@contextmanager
def claim(path: Path, *, wait: bool = False, shared: bool = False) -> Iterator[bool]:
    """Hold a file's lock, which ends with the process at the latest.

    Args:
        path: made where it is missing.
        wait: until the lock is free.
        shared: beside others that share it, instead of alone.

    Yields:
        Whether this process has it; without `wait` another one may.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a") as file:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            if _is_still(path, file.fileno()):
                yield True
                return
        # who held it has removed the file: the lock is that of the one that lies there now


def is_claimed(path: Path, *, shared: bool = False) -> bool:
    """Whether a process holds the file's lock; also one that shares it, with `shared`."""
    with claim(path, shared=not shared) as free:
        return not free


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
