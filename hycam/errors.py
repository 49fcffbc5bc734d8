"""The error for what a user gave wrong: the command line prints its one line and exits with status 2."""


class InputError(ValueError):
    """A recipe, a file, a row or an option that can't be used.

    The message is one line: where (file and line, or field), what was given, what is wanted.
    """
