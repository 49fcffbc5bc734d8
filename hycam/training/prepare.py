"""What a run needs beside its model, checked and loaded before it; and the model, not yet trained."""

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import IntervalStrategy

from hycam.adapter.init_from import check_init
from hycam.data.config import DataConfig
from hycam.errors import InputError
from hycam.evaluation.rope import longrope_switch
from hycam.training.backbone import (
    backbone_commit,
    backbone_name,
    build_model,
    check_available,
    check_max_length,
    load_backbone_config,
    load_model,
    load_tokenizer,
    num_embeddings,
)
from hycam.training.checkpoints import last_checkpoint
from hycam.training.engines import check_gpus, check_launcher
from hycam.training.folder import check_folder, check_held_out
from hycam.training.method import MethodConfig
from hycam.training.packing import check_packing
from hycam.training.recipe import Recipe
from hycam.training.resume import check_record, check_same_recipe, check_undamaged
from hycam.training.schema import suggest
from hycam.training.tasks import (
    TaskRows,
    check_tokens,
    load_rows,
    prompts_that_fit,
    responses_alone,
    tokenize_split,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRun:
    """All that a run needs beside its model, checked.

    Attributes:
        num_embeddings: how many tokens the backbone has an embedding for.
        untested: token rows of validation that no fold tests, of the tasks that have any; None unless they are asked
            for.
    """

    arguments: TrainingArguments
    rows: dict[str, TaskRows]
    backbone: str
    commit: str | None
    tokenizer: PreTrainedTokenizerBase
    num_embeddings: int
    tokenized: dict[str, dict[str, Dataset]]
    prompts: dict[str, dict[str, Any]] | None
    untested: dict[str, Dataset] | None


def prepare(recipe: Recipe, *, resume: bool, overwrite: bool, untested: bool = False) -> PreparedRun:
    """Check and read everything but the model's weights."""
    if not recipe.tasks:
        raise InputError("tasks: none given, wanted at least one")
    arguments = recipe.training_arguments()
    check_gpus(
        arguments.n_gpu, f"torchrun --standalone --nproc_per_node {arguments.n_gpu} -m hycam train {recipe.source}"
    )
    if arguments.deepspeed and arguments.use_cpu and arguments.world_size > 1:
        # transformers does this for GPUs alone, and ZeRO-3 parts the weights as soon as they are loaded
        import deepspeed

        deepspeed.init_distributed("gloo")
    if recipe.early_stopping is not None and arguments.eval_strategy == IntervalStrategy.NO:
        raise InputError("early_stopping: needs trainer.eval_strategy steps or epoch, got no")
    _check_metric(recipe, arguments.metric_for_best_model)
    _check_streaming(recipe, arguments)
    check_sharding(
        recipe.method,
        sharded=bool(arguments.deepspeed or arguments.fsdp),
        parted=bool(arguments.fsdp) or is_deepspeed_zero3_enabled(),
    )
    check_launcher(bool(arguments.deepspeed), bool(arguments.fsdp), recipe.source)
    recipe.method.check_backend(arguments.device)
    _check_liger(recipe)
    check_available(recipe.backbone)
    check_folder(recipe, resume=resume, overwrite=overwrite)
    if resume:
        check_same_recipe(recipe)
    with _first_of_machine(recipe, arguments):
        rows = load_rows(recipe.tasks, recipe.data)
    goes_on = resume and last_checkpoint(recipe.output_path) is not None
    if recipe.method.init_from is not None and not goes_on:
        check_held_out(Path(recipe.method.init_from).expanduser().parent, rows)
    with arguments.main_process_first(local=False, desc="training the backbone"):
        name = backbone_name(recipe.backbone, recipe.output_path, recipe.seed)
    config = load_backbone_config(recipe.backbone, name)
    commit = backbone_commit(recipe.backbone, name)
    if resume:
        check_record(recipe, rows, commit, arguments.world_size)
        check_undamaged(recipe, config, name)
    check_max_length(config, recipe.data.max_length, name)
    _check_frequencies(config, recipe.data, arguments)
    _check_adapter(recipe, config, starts=not goes_on)
    dtype = config.dtype if recipe.backbone.dtype == "auto" else recipe.backbone.dtype
    for warning in recipe.method.losses_in_16_bits(dtype, recipe.trainer):
        logger.warning(warning)
    tokenizer = load_tokenizer(recipe.backbone, name)
    measured = responses_alone(recipe.data)
    with _first_of_machine(recipe, arguments):
        tokenized = {} if recipe.data.streaming else {"train": tokenize_split(rows, "train", tokenizer, recipe.data)}
        tokenized |= {split: tokenize_split(rows, split, tokenizer, measured) for split in ("validation", "test")}
        chosen_on = _untested(rows, tokenizer, measured) if untested else None
    check_tokens(rows, tokenized.values(), tokenizer, config, name)
    prompts = None
    if recipe.evaluation.generation:
        prompts = prompts_that_fit(rows, "test", tokenizer, config, recipe.data, recipe.evaluation)
    return PreparedRun(arguments, rows, name, commit, tokenizer, num_embeddings(config), tokenized, prompts, chosen_on)


def _untested(rows: dict[str, TaskRows], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> dict[str, Dataset]:
    with_any = {name: task for name, task in rows.items() if len(task.split("untested"))}
    if not with_any:
        raise InputError("tasks: no validation row that no fold tests, wanted more rows: a rate is chosen on them")
    return tokenize_split(with_any, "untested", tokenizer, config)


def _first_of_machine(recipe: Recipe, arguments: TrainingArguments) -> AbstractContextManager[None]:
    """With a cache, one process of each machine fills it before the others read it."""
    if recipe.data.cache_dir is None:
        return nullcontext()
    return arguments.main_process_first(local=True, desc="filling data.cache_dir")


def _check_metric(recipe: Recipe, metric: str | None) -> None:
    scopes = ["", *(f"{task.name}_" for task in recipe.tasks)]
    known = [f"{scope}{name}" for scope in scopes for name in ("loss", "perplexity")]
    if metric is not None and metric.removeprefix("eval_") not in known:
        raise InputError(f"trainer.metric_for_best_model: got {metric!r}{suggest(metric, known)}")


def _check_streaming(recipe: Recipe, arguments: TrainingArguments) -> None:
    """Raise `InputError` for what a stream of training rows can't give, and for shares of unknown tasks."""
    if recipe.data.streaming is None:
        return
    names = [task.name for task in recipe.tasks]
    for name in recipe.data.streaming.weights or {}:
        if name not in names:
            raise InputError(f"data.streaming.weights: got {name!r}{suggest(name, names)}")
    if arguments.max_steps <= 0:
        raise InputError("trainer.max_steps: none given, wanted the number of steps with data.streaming: it has no end")
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(arguments, name) == IntervalStrategy.EPOCH:
            raise InputError(f"trainer.{name}: got epoch, wanted steps (or no) with data.streaming: it has no epochs")
    if arguments.train_sampling_strategy != "random":
        raise InputError(
            f"trainer.train_sampling_strategy: got {arguments.train_sampling_strategy}, wanted random with "
            "data.streaming: the rows come in the stream's order"
        )
    for name in ("auto_find_batch_size", "ignore_data_skip"):
        if getattr(arguments, name):
            raise InputError(
                f"trainer.{name}: got true, wanted false with data.streaming: a batch's rows follow from how many rows "
                "were in those before it"
            )
    accelerator: Any = arguments.accelerator_config  # a mapping or a file where it was given, an AcceleratorConfig here
    for name in ("dispatch_batches", "split_batches"):
        if getattr(accelerator, name):
            raise InputError(
                f"trainer.accelerator_config.{name}: got true, wanted false with data.streaming: every process takes "
                "its rows of the stream"
            )
    accelerator.dispatch_batches = False  # accelerate's default for streams is true


def _check_frequencies(config: PretrainedConfig, data: DataConfig, arguments: TrainingArguments) -> None:
    """Raise `InputError` for packed rows of which the backbone makes something else; warn of rows side by side."""
    if data.packing:
        check_packing(config, data, arguments.train_batch_size)
        return
    switch = longrope_switch(config)
    if switch is not None and data.max_length > switch and arguments.train_batch_size > 1:
        logger.warning(
            "data.max_length: %d: longrope gives every row of a micro-batch other frequencies where one is longer than "
            "%d tokens; trainer.per_device_train_batch_size: 1 trains each row as it is evaluated, alone",
            data.max_length,
            switch,
        )


def _check_liger(recipe: Recipe) -> None:
    """Raise `InputError` for what Liger's layers would undo, or don't give."""
    if not recipe.backbone.liger:
        return
    if getattr(recipe.method.adapter_config(), "fuse_norm", False):
        raise InputError(
            "method.fuse_norm: got true with backbone.liger: true, wanted one of them: both replace the norms' forward"
        )
    if recipe.trainer.get("label_smoothing_factor"):
        raise InputError(
            "trainer.label_smoothing_factor: needs logits, which backbone.liger doesn't make in training: wanted 0, or "
            "backbone.liger: false"
        )


def check_sharding(method: MethodConfig, *, sharded: bool, parted: bool) -> None:
    """Raise `InputError` for a method that needs weights or gradients whole where they are in parts.

    Args:
        method: what is trained.
        sharded: whether DeepSpeed or FSDP trains it.
        parted: whether that is ZeRO-3 or FSDP2, under which no process needs room for all weights.
    """
    if method.name == "riemoe" and sharded:
        raise InputError(
            "method.name: riemoe preconditions whole gradients, wanted no trainer.deepspeed or trainer.fsdp"
        )
    if method.init_from is not None and parted:
        raise InputError(
            "method.init_from: it is read into whole weights, wanted no ZeRO-3 in trainer.deepspeed and no trainer.fsdp"
        )
    if method.name == "full" and parted:
        raise InputError(
            "method.name: full is measured before its training too, wanted no ZeRO-3 in trainer.deepspeed and no "
            "trainer.fsdp: every process would hold the whole backbone"
        )


def _check_adapter(recipe: Recipe, config: PretrainedConfig, *, starts: bool) -> None:
    """Raise `InputError` where the adapter doesn't fit the backbone, of which no weight is loaded, or the machine, or,
    of a run that starts, what it starts from."""
    if is_deepspeed_zero3_enabled():  # which parts weights as soon as they are made, and meta tensors have none
        return
    model = adapted(build_model(recipe.backbone, config), recipe.method)
    if recipe.method.init_from is not None and starts:
        try:
            check_init(model, Path(recipe.method.init_from).expanduser())
        except InputError as error:
            raise InputError(f"method.{error}") from error
    wanted = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # where they are made, wherever they are trained
    if wanted > memory:
        raise InputError(
            f"method: {wanted / 2**30:,.0f} GiB of weights are to be trained, this machine has {memory / 2**30:,.0f}"
        )


def adapted_backbone(recipe: Recipe, name: str) -> PeftModel | PreTrainedModel:
    """The backbone from `name` with the recipe's adapter, untrained. Raises `InputError` where the two don't fit."""
    return adapted(load_model(recipe.backbone, name), recipe.method)


def adapted(backbone: PreTrainedModel, method: MethodConfig) -> PeftModel | PreTrainedModel:
    """`backbone` with the method's adapter, or itself to be trained whole.

    Raises:
        InputError: the adapter doesn't fit the backbone.
    """
    config = method.adapter_config()
    if config is None:
        return backbone
    try:
        model = get_peft_model(backbone, config, autocast_adapter_dtype=method.autocast_adapter_dtype)
    except (ValueError, RuntimeError, OverflowError, MemoryError) as error:  # sizes beyond what a tensor can have
        raise InputError(f"method: {' '.join(str(error).split()) or type(error).__name__}") from error
    assert isinstance(model, PeftModel)
    return model
