"""`hycam train`."""

import sys
from argparse import Namespace
from contextlib import redirect_stdout
from functools import partial

from accelerate import PartialState

from hycam.commands.tables import load_table, metrics_table, show
from hycam.training.folder import holds_run_of
from hycam.training.recipe import load_recipe
from hycam.training.run import train


def run(options: Namespace) -> None:
    recipe = load_recipe(options.recipe or "demo", options.overrides)
    again = options.recipe is None and not options.resume and holds_run_of(recipe)
    announce = partial(print, file=sys.stdout)
    # stdout is for the results; the Trainer's log and DeepSpeed's warnings go there of themselves
    with redirect_stdout(sys.stderr):
        results = train(recipe, resume=options.resume, overwrite=options.overwrite or again, announce=announce)
    if not PartialState().is_main_process:
        return
    show(metrics_table("test split", results["test"]))
    if "expert_load" in results:
        show(load_table(results["expert_load"]))
    print(f"adapter, metrics, results and plots: {recipe.output_path}")
