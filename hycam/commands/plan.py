"""`hycam plan`."""

import json
from argparse import Namespace

from rich.table import Table
from transformers import PretrainedConfig

from hycam.commands.tables import show
from hycam.planning.engines import engine_of
from hycam.planning.plan import Plan, plan_memory
from hycam.training.backbone import load_backbone_config
from hycam.training.known_backbones import known_config
from hycam.training.recipe import Recipe, load_recipe
from hycam.training.scratch import scratch_model_config

_ROWS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations (peak)",
    "gathered": "gathered parameters",
    "buckets": "gradient buckets",
    "sum": "sum",
    "host": "on the host instead",
}


def run(options: Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides)
    engine = engine_of(recipe, options.engine)
    plans = plan_memory(recipe, backbone_config(recipe), engine, options.world_size)
    if options.json:
        print(json.dumps([plan.to_dict() for plan in plans], indent=2))
    else:
        show(memory_table(plans))
        first = plans[0]
        rows = recipe.trainer.get("per_device_train_batch_size", 8)
        print(f"{first.trained:,} of {first.total:,} parameters are trained ({first.trained / first.total:.2%});")
        print(f"{', '.join(f'{name} in {dtype}' for name, dtype in first.dtypes.items())};")
        print(f"a micro-batch of {rows} rows of {recipe.data.max_length} tokens")


def backbone_config(recipe: Recipe) -> PretrainedConfig:
    """The configuration of the backbone, which is neither loaded nor, from scratch, trained."""
    if recipe.backbone.scratch is not None:
        return scratch_model_config(recipe.backbone.scratch)
    assert recipe.backbone.name_or_path is not None
    known = known_config(recipe.backbone.name_or_path)
    return load_backbone_config(recipe.backbone, recipe.backbone.name_or_path) if known is None else known


def memory_table(plans: list[Plan]) -> Table:
    """GiB per GPU, a column for each number of processes."""
    table = Table(title=f"{plans[0].engine}: GiB per GPU")
    table.add_column("")
    for plan in plans:
        table.add_column(f"{plan.world_size} GPU{'s' if plan.world_size > 1 else ''}", justify="right")
    for field, label in _ROWS.items():
        if field == "sum":
            table.add_section()
        if field != "host" or plans[0].host:
            table.add_row(label, *(f"{plan.to_dict()[field] / 2**30:.3f}" for plan in plans))
    return table
