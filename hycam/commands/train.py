"""`hycam train`."""

from argparse import Namespace

from hycam.commands.tables import load_table, metrics_table, show
from hycam.training.recipe import load_recipe
from hycam.training.run import train


def run(options: Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides)
    results = train(recipe, resume=options.resume, overwrite=options.overwrite)
    show(metrics_table("test split", results["test"]))
    if "expert_load" in results:
        show(load_table(results["expert_load"]))
    print(f"adapter, metrics and results: {recipe.output_path}")
