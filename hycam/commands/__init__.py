"""The commands of `hycam`, one module each with `run(options)`; imported only when one is called."""

import importlib
from argparse import Namespace

from hycam.training.progress import keep_others_quiet


def run_command(name: str, options: Namespace) -> None:
    """Run one command."""
    if name != "exec":  # another package's command speaks as it does by itself
        keep_others_quiet()
    importlib.import_module(f"hycam.commands.{name}").run(options)
