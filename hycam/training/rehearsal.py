"""A step of training on a stand-in, before the model is loaded: what the run will build of its settings refuses them.

transformers, torch and accelerate each check their own part of `trainer`, most of it when training begins. So all of it
is built here once, with a tiny model, and takes a step.
"""

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hycam.errors import InputError
from hycam.training.measure import own_draws
from hycam.training.recipe import Recipe


class _Rows(IterableDataset[dict[str, Any]]):
    """Stand in for a stream, of which rehearsing would read as many rows as its buffer holds."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield {}


def _stand_in() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=4, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config)


def _batch(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, 2, 3]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def rehearse(recipe: Recipe, arguments: TrainingArguments, dataset: Any) -> None:
    """Raise `InputError`, with the field, for a setting of `trainer` that training would fail on.

    Engines, whose settings belong to all processes together, check theirs by themselves.

    Args:
        dataset: the rows that training takes.
    """
    if arguments.deepspeed or arguments.fsdp or arguments.world_size > 1:
        return
    error = _failure(arguments, dataset)
    if error is None:
        return
    shown = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    field = _culprit(recipe, dataset, str(error))
    where = "trainer" if field is None else f"trainer.{field}: got {recipe.trainer[field]!r}"
    raise InputError(f"{recipe.source}: {where}: {shown}") from error


def _culprit(recipe: Recipe, dataset: Any, message: str) -> str | None:
    """The field without which the step succeeds, tried first where the message speaks of it."""
    unnamed = {name: name not in message and str(value) not in message for name, value in recipe.trainer.items()}
    for field in sorted(unnamed, key=unnamed.__getitem__):
        without = copy.copy(recipe)
        without.trainer = {name: value for name, value in recipe.trainer.items() if name != field}
        try:
            arguments = without.training_arguments()
        except InputError:
            continue
        if _failure(arguments, dataset) is None:
            return field
    return None


def _failure(arguments: TrainingArguments, dataset: Any) -> Exception | None:
    """What goes wrong in a step, None where nothing does."""
    own = copy.copy(arguments)
    own.eval_strategy = own.logging_strategy = IntervalStrategy.NO
    own.save_strategy = SaveStrategy.NO
    own.load_best_model_at_end = own.auto_find_batch_size = own.eval_on_start = False
    own.use_liger_kernel = False
    own.report_to, own.disable_tqdm, own.max_steps = [], True, 1
    # with `push_to_hub` the repository is made, or refused, here; its name would follow from the temporary folder
    own.hub_model_id = own.hub_model_id or Path(str(own.output_dir)).absolute().name
    rows: Any = _Rows() if isinstance(dataset, IterableDataset) else dataset
    with tempfile.TemporaryDirectory() as folder, own_draws(arguments.seed, arguments.device):
        own.output_dir = folder
        try:
            trainer = Trainer(_stand_in(), own, data_collator=_batch, train_dataset=rows)
            trainer.remove_callback(PrinterCallback)
            loader = trainer.get_train_dataloader()
            if rows is dataset and not len(loader):
                raise ValueError(f"dataloader_drop_last leaves none of {len(rows)} rows, which are fewer than a batch")
            if own.torch_compile:  # which takes longer than all else together, and has been looked up by now
                trainer.create_optimizer_and_scheduler(num_training_steps=1)
            else:
                trainer.train()
        except Exception as error:  # the kinds are those of all libraries that `trainer` reaches
            return error
    return None
