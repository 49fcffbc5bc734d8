"""A run that `hycam train` made, and ways to start the command."""

import os
import sys
from pathlib import Path

import pytest

import hycam_cli
from hycam_cli import main

_MAIN = "import sys; from hycam_cli import main; sys.exit(main())"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(hycam_cli.__file__).parents[1])}


def in_a_process(*arguments: str) -> list[str]:
    """The argument list of the command in a process of its own."""
    return [sys.executable, "-c", _MAIN, *arguments]


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an invocation that fails with status 2."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("hycam: error: ")
    return captured.err.removeprefix("hycam: error: ").rstrip("\n")
