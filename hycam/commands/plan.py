"""`hycam plan`."""

import json
from argparse import Namespace
from pathlib import Path

from rich.table import Table
from transformers import PretrainedConfig

from hycam.commands.tables import show
from hycam.planning.engines import engine_of
from hycam.planning.plan import Plan, arguments_here, plan_memory
from hycam.planning.process import process_bytes
from hycam.study.recipe import STUDY_FILE, load_study, packaged_studies
from hycam.training.backbone import load_backbone_config
from hycam.training.known_backbones import known_config
from hycam.training.recipe import Recipe, load_recipe
from hycam.training.recipe_files import read_yaml
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
    if _is_study(options.recipe):
        _plan_study(options)
        return
    recipe = load_recipe(options.recipe, options.overrides)
    here = process_bytes(recipe, arguments_here(recipe))
    plans = _plans(recipe, options)
    first = plans[0]
    on_cpu = None if here is None else first.on_cpu(here)
    if options.json:
        print(json.dumps([plan.to_dict() | {"process": here, "on_cpu": on_cpu} for plan in plans], indent=2))
    else:
        show(memory_table(plans))
        if here is not None and on_cpu is not None:
            packages, later = here / 2**30, first.activations / 2**30
            print(f"without a GPU {on_cpu / 2**30:.3f} GiB in the first steps, {packages:.3f} of them for packages and")
            print(f"tokenizer; over many steps up to about {later:.3f} more that glibc's allocator holds free;")
        print(f"{first.trained:,} of {first.total:,} parameters are trained ({first.trained / first.total:.2%});")
        print(f"{', '.join(f'{name} in {dtype}' for name, dtype in first.dtypes.items())};")
        print(_micro_batch(recipe))


def _plans(recipe: Recipe, options: Namespace) -> list[Plan]:
    return plan_memory(recipe, backbone_config(recipe), engine_of(recipe, options.engine), options.world_size)


def _micro_batch(recipe: Recipe) -> str:
    rows = recipe.trainer.get("per_device_train_batch_size", 8)
    return f"a micro-batch of {rows} rows of {recipe.data.max_length} tokens"


def _is_study(name_or_path: str) -> bool:
    """Whether it names a study: one that ships, a study's folder, or a file that has methods."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        values = read_yaml(path)
        return isinstance(values, dict) and "methods" in values
    return (path / STUDY_FILE).is_file() or (name_or_path in packaged_studies() and not path.exists())


def _plan_study(options: Namespace) -> None:
    """Every method on every backbone: a run of a study is planned as any other."""
    study = load_study(options.recipe, options.overrides)
    found: dict[str, dict[str, list[Plan]]] = {}
    for backbone in study.backbones:
        found[backbone] = {}
        for method in study.methods:
            rate = study.rates(method)[0]
            recipe = study.recipe(backbone, method, fold=0, seed=0, learning_rate=rate, folder=".")
            found[backbone][method] = _plans(recipe, options)
    if options.json:
        plain = {
            backbone: {method: [plan.to_dict() for plan in plans] for method, plans in methods.items()}
            for backbone, methods in found.items()
        }
        print(json.dumps(plain, indent=2))
        return
    show(*(study_memory_table(backbone, methods) for backbone, methods in found.items()))


def study_memory_table(backbone: str, methods: dict[str, list[Plan]]) -> Table:
    """GiB per GPU of each method: the activations of the first number of processes, and the sums of all."""
    first = next(iter(methods.values()))
    table = Table(title=f"{backbone}, {first[0].engine}: GiB per GPU")
    table.add_column("", no_wrap=True)
    for heading in ("trained", "activations", *(f"sum, {_processes(plan)}" for plan in first)):
        table.add_column(heading, justify="right")
    for method, plans in methods.items():
        numbers = [plans[0].activations, *(plan.sum for plan in plans)]
        table.add_row(method, f"{plans[0].trained:,}", *(f"{number / 2**30:.3f}" for number in numbers))
    return table


def _processes(plan: Plan) -> str:
    return f"{plan.world_size} GPU{'s' if plan.world_size > 1 else ''}"


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
        table.add_column(_processes(plan), justify="right")
    for field, label in _ROWS.items():
        if field == "sum":
            table.add_section()
        if field != "host" or plans[0].host:
            table.add_row(label, *(f"{plan.to_dict()[field] / 2**30:.3f}" for plan in plans))
    return table
