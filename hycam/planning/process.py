"""What a training process holds beside its model: modules, tokenizer, and what a first step sets up."""

import contextlib
from pathlib import Path

from datasets import Dataset
from transformers import TrainingArguments

from hycam.errors import InputError
from hycam.training.backbone import load_tokenizer
from hycam.training.recipe import Recipe
from hycam.training.rehearsal import rehearse


def process_bytes(recipe: Recipe, arguments: TrainingArguments) -> int | None:
    """Resident bytes of this process once it has done what a run does before it loads its model.

    The packages are imported, the tokenizer is loaded where it is at hand, and a step is rehearsed on a stand-in. None
    where the system doesn't tell.

    Args:
        arguments: of the recipe, as far as this machine takes them.

    Raises:
        InputError: for a setting of `trainer` that training would fail on.
    """
    import hycam.training.run  # noqa: F401 (what a run imports)

    statistics = Path("/proc/self/status")
    if not statistics.is_file():
        return None
    tokenizer = None
    if recipe.backbone.name_or_path is not None:
        with contextlib.suppress(InputError):  # not on this machine, or behind a licence: it is small beside the rest
            tokenizer = load_tokenizer(recipe.backbone, recipe.backbone.name_or_path, local_files_only=True)
    rehearse(recipe, arguments, Dataset.from_dict({"input_ids": [[1]] * 8}))
    line = next(line for line in statistics.read_text().splitlines() if line.startswith("VmRSS:"))
    del tokenizer
    return int(line.split()[1]) * 1024
