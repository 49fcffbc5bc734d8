"""The error for what a user gave wrong: the command line prints its one line and exits with status 2."""

import errno
import importlib.metadata

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# how libraries without an errno of their own write it: the system's words, and torch's zip writer
_NO_ROOM_TEXTS = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing")


class InputError(ValueError):
    """A recipe, a file, a row or an option that can't be used.

    The message is one line: where (file and line, or field), what was given, what is wanted.
    """


def check_format_version(found: object, known: int, where: str) -> None:
    """Raise `InputError` for the version of a saved format that this package can't read.

    Args:
        found: the version that the file names.
        known: the latest that is read, with all before it.
        where: the file, for the message, with a colon and a space.
    """
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise InputError(f"{where}format_version: got {found!r}, want an integer of at least 1")
    if found > known:
        installed = importlib.metadata.version("hycam-kernels")
        raise InputError(
            f"{where}format_version: got {found}, which a later version wrote; hycam-kernels {installed} reads up to "
            f"{known}: pip install --upgrade hycam-kernels"
        )


class RunStoppedError(RuntimeError):
    """A run that ended before its end with its last good state on disk; the message says how to go on.

    Attributes:
        exit_status: the command's exit status, never 0.
    """

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class NotFiniteError(RunStoppedError):
    """A run that ended because its loss or a gradient was not finite."""


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or what it came from, is a write that found no room."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            return True
        if isinstance(cause, Exception) and any(text in str(cause) for text in _NO_ROOM_TEXTS):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
