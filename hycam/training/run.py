"""One run, from a recipe to an adapter and its numbers."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import (
    EarlyStoppingCallback,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import IntervalStrategy

from hycam import HyCAMConfig
from hycam.analysis import prompt_modulation, write_plots
from hycam.data import Collator
from hycam.environment import devices, package_versions
from hycam.errors import InputError, RunStoppedError
from hycam.evaluation.expert_load import evaluate_expert_load
from hycam.training.backbone import (
    backbone_commit,
    backbone_name,
    build_model,
    check_available,
    check_max_length,
    load_backbone_config,
    load_model,
    load_tokenizer,
)
from hycam.training.callbacks import MetricsFile, SaveOnSignal, finite, read_metrics, validation_is_due, write_whole
from hycam.training.engines import check_gpus, timeouts_told
from hycam.training.folder import check_folder, open_folder, shared_checkpoint
from hycam.training.measure import measure, own_draws, training_precision
from hycam.training.method import MethodConfig
from hycam.training.recipe import Recipe
from hycam.training.schema import suggest
from hycam.training.tasks import (
    TaskRows,
    load_rows,
    prompts_that_fit,
    responses_alone,
    tokenize_split,
    training_set,
)
from hycam.training.trainer import HyCAMTrainer, checkpoint_state, last_checkpoint, remove_unfinished

ADAPTER_FOLDER = "adapter"
MODEL_FOLDER = "model"
METRICS_FILE = "metrics.jsonl"
RESULTS_FILE = "results.json"
PLOTS_FOLDER = "plots"
_PLOTTED_LAYERS = 4
_PLOTTED_TOKENS = 80


@dataclass(frozen=True)
class PreparedRun:
    """All that a run needs beside its model, checked."""

    arguments: TrainingArguments
    rows: dict[str, TaskRows]
    backbone: str
    commit: str | None
    tokenizer: PreTrainedTokenizerBase
    tokenized: dict[str, dict[str, Dataset]]
    prompts: dict[str, dict[str, Any]] | None


def _silent(line: str) -> None:
    pass


@timeouts_told()
def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    announce: Callable[[str], object] = _silent,
    test: bool = True,
    base: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train the recipe's adapter, or its whole backbone, and measure it on the test split.

    The output folder gets `recipe.yaml` and `run.json` (what the run is), `metrics.jsonl` (every log event),
    TensorBoard events, `checkpoint-*` (adapter and training state), `adapter` (the best one), `results.json` and
    `plots`. Full fine-tuning leaves `model`, with the tokenizer, in the place of `adapter`.

    Args:
        recipe: what to train.
        resume: go on from the last whole checkpoint of the output folder; from the start where it has none.
        overwrite: delete the run that the output folder holds.
        announce: is told, in the main process, what the run is about to do: a line each.
        test: measure the test split; without it the results have no `test` and no `expert_load`, and nothing is drawn.
        base: the backbone's own metrics on this test split where they are known, as a run's `results["test"]["base"]`
            has them; None: they are measured.

    Returns:
        What `results.json` holds.

    Raises:
        InputError: anything wrong with the recipe, the data or the output folder, before the model is loaded.
        RunStoppedError: a signal, or a loss that is not finite; the last good checkpoint is kept.
    """
    prepared = prepare(recipe, resume=resume, overwrite=overwrite)
    set_seed(recipe.seed)
    model = adapted_backbone(recipe, prepared.backbone)
    if not prepared.arguments.should_save:
        announce = _silent
    trainable, total = _parameter_counts(model)
    announce(f"{prepared.backbone}: {trainable:,} of {total:,} parameters are trained ({trainable / total:.2%})")
    with SaveOnSignal() as on_signal:
        trainer = _trainer(recipe, prepared, model, on_signal)
        trainer.accelerator.wait_for_everyone()  # until then every process has checked that the folder is free
        with prepared.arguments.main_process_first(local=False, desc="opening the run's folder"):
            if prepared.arguments.should_save:
                processes = prepared.arguments.world_size
                open_folder(recipe, prepared.rows, prepared.commit, processes, resume=resume, overwrite=overwrite)
                remove_unfinished(recipe.output_path)
        checkpoint = shared_checkpoint(recipe.output_path, prepared.arguments.device)
        if resume:
            announce("no checkpoint yet: from the start" if checkpoint is None else f"going on from {checkpoint}")
        if test and base is None and not isinstance(model, PeftModel):  # training will change the backbone
            device: Any = prepared.arguments.device
            with training_precision(recipe, device):
                base = _measure_test(recipe, prepared, model.to(device), "test, backbone")
        state = _fit(recipe, trainer, checkpoint)
    trainer.save_model(str(trained_folder(recipe)))
    if prepared.arguments.should_save and not isinstance(model, PeftModel):
        prepared.tokenizer.save_pretrained(trained_folder(recipe))  # the model is loaded without its backbone
    results = _describe_run(recipe, prepared, model)
    results |= {"steps": state.global_step, "epochs": state.epoch, "best_step": state.best_global_step}
    if not test:
        if prepared.arguments.should_save:
            _write_json(recipe.output_path / RESULTS_FILE, results)
        return results
    row = next(iter(prepared.tokenized["test"].values()))[0]["input_ids"][:_PLOTTED_TOKENS]
    is_hycam = recipe.method.name == "hycam"
    with training_precision(recipe, prepared.arguments.device):
        results = _measure_run(recipe, prepared, model, base) | results
        # every process takes part in a forward of a model that is in parts
        modulation = prompt_modulation(model, row, max_layers=_PLOTTED_LAYERS) if is_hycam else None
    if prepared.arguments.should_save:
        _write_json(recipe.output_path / RESULTS_FILE, results)
        _draw(recipe, prepared.tokenizer, row, modulation, results)
    return results


def prepare(recipe: Recipe, *, resume: bool, overwrite: bool) -> PreparedRun:
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
    if resume and arguments.save_only_model:
        raise InputError("--resume: trainer.save_only_model is true, so no checkpoint has the optimizer's state")
    _check_metric(recipe, arguments.metric_for_best_model)
    check_sharding(
        recipe.method,
        sharded=bool(arguments.deepspeed or arguments.fsdp),
        parted=bool(arguments.fsdp) or is_deepspeed_zero3_enabled(),
    )
    recipe.method.check_backend(arguments.device)
    _check_liger(recipe)
    check_available(recipe.backbone)
    check_folder(recipe, resume=resume, overwrite=overwrite)
    with _first_of_machine(recipe, arguments):
        rows = load_rows(recipe.tasks, recipe.data)
    with arguments.main_process_first(local=False, desc="training the backbone"):
        name = backbone_name(recipe.backbone, recipe.output_path, recipe.seed)
    config = load_backbone_config(recipe.backbone, name)
    commit = backbone_commit(recipe.backbone, name)
    check_max_length(config, recipe.data.max_length, name)
    _check_adapter(recipe, config)
    tokenizer = load_tokenizer(recipe.backbone, name)
    measured = responses_alone(recipe.data)
    with _first_of_machine(recipe, arguments):
        tokenized = {
            "train": tokenize_split(rows, "train", tokenizer, recipe.data),
            "validation": tokenize_split(rows, "validation", tokenizer, measured),
            "test": tokenize_split(rows, "test", tokenizer, measured),
        }
    prompts = None
    if recipe.evaluation.generation:
        prompts = prompts_that_fit(rows, "test", tokenizer, config, recipe.data, recipe.evaluation)
    return PreparedRun(arguments, rows, name, commit, tokenizer, tokenized, prompts)


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
    if method.name == "full" and parted:
        raise InputError(
            "method.name: full is measured before its training too, wanted no ZeRO-3 in trainer.deepspeed and no "
            "trainer.fsdp: every process would hold the whole backbone"
        )


def _check_adapter(recipe: Recipe, config: PretrainedConfig) -> None:
    """Raise `InputError` where the adapter doesn't fit the backbone, of which no weight is loaded."""
    if not is_deepspeed_zero3_enabled():  # which parts weights as soon as they are made, and meta tensors have none
        adapted(build_model(recipe.backbone, config), recipe.method)


def trained_folder(recipe: Recipe) -> Path:
    """Where a run of the recipe leaves what it trained: the adapter, or the whole model."""
    return recipe.output_path / (MODEL_FOLDER if recipe.method.name == "full" else ADAPTER_FOLDER)


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
    except ValueError as error:
        raise InputError(f"method: {' '.join(str(error).split())}") from error
    assert isinstance(model, PeftModel)
    return model


def _trainer(
    recipe: Recipe, prepared: PreparedRun, model: PeftModel | PreTrainedModel, on_signal: SaveOnSignal
) -> HyCAMTrainer:
    callbacks: list[TrainerCallback] = [MetricsFile(recipe.output_path / METRICS_FILE)]
    if recipe.early_stopping is not None:
        stopping = recipe.early_stopping
        callbacks.append(EarlyStoppingCallback(stopping.patience, stopping.threshold))
    pad = prepared.tokenizer.pad_token_id
    return HyCAMTrainer(
        model=model,
        args=prepared.arguments,
        train_dataset=training_set(prepared.tokenized["train"], recipe.data, recipe.seed),
        data_collator=Collator(pad, packing=recipe.data.packing),
        validation=prepared.tokenized["validation"],
        evaluation_collator=Collator(pad),
        on_signal=on_signal,
        prepare_optimizer=recipe.method.prepare_optimizer,
        callbacks=callbacks,
    )


def _fit(recipe: Recipe, trainer: HyCAMTrainer, checkpoint: Path | None) -> TrainerState:
    """Train from `checkpoint` on; the model ends with the best weights where the recipe asks for them."""
    folder = recipe.output_path
    state = None if checkpoint is None else checkpoint_state(checkpoint)
    if state is not None and _is_finished(recipe, state):
        final = checkpoint
        if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            final = folder / Path(state.best_model_checkpoint).name
        if trainer.is_deepspeed_enabled:
            # without an engine, which training alone makes, the weights are in parts
            raise InputError(f"--resume: the training is done; measure it with: hycam eval {folder} --adapter {final}")
        assert final is not None
        trainer.load_weights(final)
        if trainer.is_fsdp_enabled:  # training alone would place it, in parts
            trainer.adapted.to(trainer.args.device)
        return state
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except RunStoppedError as error:
        if trainer.on_signal.received is None:
            raise RunStoppedError(f"{error}; {_kept(folder)}") from error
    number = trainer.on_signal.agree(trainer.args.device)
    if number is not None:
        where = f"stopped by {number.name} after step {trainer.state.global_step}; {_kept(folder)}"
        raise RunStoppedError(f"{where}; go on with: hycam train {folder} --resume", 128 + number)
    return trainer.state


def _is_finished(recipe: Recipe, state: TrainerState) -> bool:
    """Whether a checkpoint is its run's last: all steps are done and validated, or early stopping ended it."""
    if validation_is_due(state):
        return False
    if state.global_step >= state.max_steps:
        return True
    # a mapping from callback to state, although transformers annotates a list of callbacks
    stateful: Any = state.stateful_callbacks
    stopping = stateful.get("EarlyStoppingCallback")
    if recipe.early_stopping is None or stopping is None:
        return False
    return stopping["attributes"]["early_stopping_patience_counter"] >= recipe.early_stopping.patience


def _kept(folder: Path) -> str:
    checkpoint = last_checkpoint(folder)
    return "no checkpoint was saved before it" if checkpoint is None else f"the last good checkpoint is {checkpoint}"


def _parameter_counts(model: PeftModel | PreTrainedModel) -> tuple[int, int]:
    """Trained parameters, and all."""
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()
    return model.num_parameters(only_trainable=True), model.num_parameters()


def _measure_test(
    recipe: Recipe, prepared: PreparedRun, model: PeftModel | PreTrainedModel, description: str
) -> dict[str, Any]:
    """The model's metrics on the test split."""
    return measure(
        model,
        prepared.tokenizer,
        prepared.tokenized["test"],
        prepared.prompts,
        recipe.evaluation,
        seed=recipe.seed,
        description=description,
    )


def _describe_run(recipe: Recipe, prepared: PreparedRun, model: PeftModel | PreTrainedModel) -> dict[str, Any]:
    """What was trained, on how much, with what."""
    trainable, total = _parameter_counts(model)
    return {
        "rows": {
            split: {name: len(dataset) for name, dataset in tasks.items()}
            for split, tasks in prepared.tokenized.items()
        },
        "parameters": {"trainable": trainable, "total": total},
        "backbone": prepared.backbone,
        "recipe": recipe.to_dict(),
        "versions": package_versions(),
        "devices": devices(),
    }


def _measure_run(
    recipe: Recipe, prepared: PreparedRun, model: PeftModel | PreTrainedModel, base: dict[str, Any] | None
) -> dict[str, Any]:
    """The test split's metrics of the backbone alone and of the trained model, and the experts' load.

    Args:
        base: the backbone's metrics; None: from the model, without its adapter.
    """
    if base is None:
        assert isinstance(model, PeftModel)
        with model.disable_adapter():
            base = _measure_test(recipe, prepared, model, "test, backbone")
    adapted = _measure_test(recipe, prepared, model, "test, adapted")
    results: dict[str, Any] = {"test": {"base": base, "adapted": adapted}}
    config = recipe.method.adapter_config()
    if isinstance(config, HyCAMConfig) and config.experts != "none":
        collator = Collator(prepared.tokenizer.pad_token_id)
        with own_draws(recipe.seed, prepared.arguments.device):
            results["expert_load"] = evaluate_expert_load(
                model, prepared.tokenized["test"], collator, batch_size=recipe.evaluation.batch_size
            )
    return results


def _draw(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    row: list[int],
    modulation: dict[str, torch.Tensor] | None,
    results: dict[str, Any],
) -> None:
    """Loss curves, experts' load, and HyCAM's modulation of the beginning of one test row."""
    write_plots(
        recipe.output_path / PLOTS_FOLDER,
        metrics=read_metrics(recipe.output_path / METRICS_FILE),
        loads=results.get("expert_load"),
        modulation=modulation,
        tokens=[str(tokenizer.decode([token])) for token in row],
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_whole(path, json.dumps(finite(values), indent=2, allow_nan=False) + "\n")
