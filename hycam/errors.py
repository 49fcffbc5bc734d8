"""The error for what a user gave wrong: the command line prints its one line and exits with status 2."""


class InputError(ValueError):
    """A recipe, a file, a row or an option that can't be used.

    The message is one line: where (file and line, or field), what was given, what is wanted.
    """


class RunStoppedError(RuntimeError):
    """A run that ended before its end with its last good state on disk; the message says how to go on.

    Attributes:
        exit_status: the command's exit status, never 0.
    """

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status
