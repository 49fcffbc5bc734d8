"""The commands of `hycam`, one module each with `run(options)`; imported only when one is called."""

import importlib
import sys
import warnings
from argparse import Namespace

import datasets
import huggingface_hub
import transformers


def run_command(name: str, options: Namespace) -> None:
    """Run one command, with other packages' chatter kept off a stderr that is no terminal."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        huggingface_hub.utils.logging.set_verbosity_error()
    # what transformers and PEFT will rename some day is no matter of the user's
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|peft\.")
    importlib.import_module(f"hycam.commands.{name}").run(options)
