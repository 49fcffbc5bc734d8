"""`hycam exec`."""

import sys
from argparse import Namespace
from importlib.metadata import entry_points

import hycam  # noqa: F401 (makes the methods known to PEFT, which is why a tool is run from here)
from hycam.errors import InputError


def run(options: Namespace) -> None:
    """Run another package's command in this process, as its own script would, and end with its exit status."""
    found = tuple(entry_points(group="console_scripts", name=options.tool))
    if not found:
        raise InputError(
            f"TOOL: got {options.tool!r}, wanted the command of an installed Python package, as in: "
            "hycam exec lm-eval --help"
        )
    sys.argv = [options.tool, *options.arguments]
    sys.exit(found[0].load()())
