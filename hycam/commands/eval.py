"""`hycam eval`."""

import json
from argparse import Namespace
from pathlib import Path

from hycam.commands.selection import check_output, select
from hycam.commands.tables import metrics_table, show
from hycam.environment import package_versions
from hycam.errors import InputError
from hycam.training.backbone import check_max_length, load_backbone_config
from hycam.training.callbacks import finite
from hycam.training.folder import check_held_out, trained_folder
from hycam.training.measure import measure, training_precision
from hycam.training.tasks import check_tokens, load_rows, prompts_that_fit, responses_alone, tokenize_split
from hycam.training.trained import Selection, load_selected_model, load_selected_tokenizer


def _measured(selection: Selection, *, base: bool) -> str:
    """What the file's name says of what is measured: nothing of a run's own adapter."""
    if selection.adapter is None:
        return "base-" if base else ""
    folder = selection.adapter.resolve()
    own = selection.run is not None and folder == (selection.run / trained_folder(selection.recipe).name).resolve()
    return "" if own else f"{folder.name}-"


def run(options: Namespace) -> None:
    selection = select(options, options.task)
    recipe = selection.recipe
    if not recipe.tasks:
        raise InputError("tasks: none given, wanted a recipe with tasks, or --task NAME[=SOURCE]")
    measured = _measured(selection, base=options.base)
    output = Path(options.output or (selection.run or Path()) / f"eval-{measured}{options.split}.json")
    check_output(output)
    rows = load_rows(recipe.tasks, recipe.data, whole=options.split == "all")
    if selection.adapter is not None and options.split in ("validation", "test"):
        check_held_out(selection.adapter.parent, rows)
    name, tokenizer = load_selected_tokenizer(selection)
    config = load_backbone_config(recipe.backbone, name)
    check_max_length(config, recipe.data.max_length, name)
    tokenized = tokenize_split(rows, options.split, tokenizer, responses_alone(recipe.data))
    check_tokens(rows, [tokenized], tokenizer, config, name)
    prompts = None
    if not options.no_generation:
        prompts = prompts_that_fit(rows, options.split, tokenizer, config, recipe.data, recipe.evaluation)
    model = load_selected_model(selection, name, tokenizer)
    with training_precision(recipe, model.device):
        report = measure(
            model, tokenizer, tokenized, prompts, recipe.evaluation, seed=recipe.seed, description=options.split
        )
    record = report | {
        "split": options.split,
        "backbone": name,
        "adapter": None if selection.adapter is None else str(selection.adapter),
        "recipe": recipe.to_dict(),
        "versions": package_versions(),
    }
    output.write_text(json.dumps(finite(record), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    label = name if selection.adapter is None else str(selection.adapter)
    show(metrics_table(f"{options.split} split, {label}", {label: report}))
    print(f"written to {output}")
