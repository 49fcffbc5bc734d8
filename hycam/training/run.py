"""One run, from a recipe to an adapter and its numbers."""

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_callback import TrainerState

from hycam.adapter.config import HyCAMConfig
from hycam.adapter.init_from import init_from
from hycam.analysis.modulation import prompt_modulation
from hycam.analysis.run_plots import write_plots
from hycam.data.collation import Collator
from hycam.data.streaming import StreamCollator, StreamedRows
from hycam.environment import devices, package_versions
from hycam.errors import InputError, RunStoppedError
from hycam.evaluation.batches import Collate
from hycam.evaluation.expert_load import evaluate_expert_load
from hycam.evaluation.generation import end_with_answers
from hycam.training.callbacks import MetricsFile, SaveOnSignal, finite, read_metrics, validation_is_due, write_whole
from hycam.training.checkpoints import checkpoint_state, damaged_checkpoints, last_checkpoint, remove_unfinished
from hycam.training.engines import timeouts_told
from hycam.training.folder import (
    METRICS_FILE,
    RESULTS_FILE,
    disk_full_told,
    ended_in,
    has_progress,
    hold_folder,
    open_folder,
    read_results,
    trained_folder,
)
from hycam.training.measure import measure, own_draws, training_precision
from hycam.training.model_card import write_run_card
from hycam.training.packing import IsolatedRows
from hycam.training.prepare import PreparedRun, adapted_backbone, prepare
from hycam.training.recipe import Recipe
from hycam.training.rehearsal import rehearse
from hycam.training.resume import shared_checkpoint
from hycam.training.tasks import training_set
from hycam.training.trainer import HyCAMTrainer

PLOTS_FOLDER = "plots"
_PLOTTED_LAYERS = 4
_PLOTTED_TOKENS = 80


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
            They have `untested` instead: the perplexity on the validation rows that no fold tests.
        base: the backbone's own metrics on this test split where they are known, as a run's `results["test"]["base"]`
            has them; None: they are measured.

    Returns:
        What `results.json` holds.

    Raises:
        InputError: anything wrong with the recipe, the data or the output folder, before the model is loaded; a flaw
            of a stream's row where training comes to it, with the last good checkpoint kept.
        RunStoppedError: a signal, a loss that is not finite (`NotFiniteError`), or a full disk; the last good
            checkpoint is kept.
    """
    if resume and recipe.trainer.get("save_only_model"):
        raise InputError("--resume: trainer.save_only_model is true, so no checkpoint has the optimizer's state")
    with _held(recipe), disk_full_told(recipe.output_path, _kept):
        goes_on = resume and has_progress(recipe.output_path)
        prepared = prepare(recipe, resume=goes_on, overwrite=overwrite, untested=not test)
        if resume and not goes_on and prepared.arguments.should_save:
            announce("no checkpoint yet: from the start")
        return _train(recipe, prepared, goes_on, overwrite, announce, test, base)


def _held(recipe: Recipe) -> AbstractContextManager[None]:
    """The output folder, which the main process holds for all."""
    return hold_folder(recipe) if int(os.environ.get("RANK", "0")) == 0 else nullcontext()


def _train(
    recipe: Recipe,
    prepared: PreparedRun,
    resume: bool,
    overwrite: bool,
    announce: Callable[[str], object],
    test: bool,
    base: dict[str, Any] | None,
) -> dict[str, Any]:
    rehearse(recipe, prepared.arguments, _training_rows(recipe, prepared))
    set_seed(recipe.seed)
    model = adapted_backbone(recipe, prepared.backbone)
    end_with_answers(model, prepared.tokenizer, recipe.data.prompt)
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
                for damaged, reason in damaged_checkpoints(recipe.output_path).items():
                    announce(f"{damaged} is not whole ({reason}) and is removed")
                remove_unfinished(recipe.output_path)
        checkpoint = shared_checkpoint(recipe.output_path, prepared.arguments.device)
        ended = ended_in(recipe) if resume else None
        if ended is not None:
            announce(f"the run has ended: {ended} is measured again")
        elif resume:
            read = "" if recipe.data.streaming is None else ", once the streams are read up to it"
            announce("no checkpoint yet: from the start" if checkpoint is None else f"going on from {checkpoint}{read}")
        if recipe.method.init_from is not None and checkpoint is None and ended is None:
            announce(init_from(model, Path(recipe.method.init_from).expanduser()))
        if test and base is None and not isinstance(model, PeftModel):  # training will change the backbone
            device: Any = prepared.arguments.device
            with training_precision(recipe, device):
                base = _measure_test(recipe, prepared, model.to(device), "test, backbone")
        state = _fit(recipe, trainer, checkpoint, ended)
    if trained_folder(recipe) != ended:
        trainer.save_model(str(trained_folder(recipe)))
    if prepared.arguments.should_save:
        if isinstance(model, PeftModel):
            model.generation_config.save_pretrained(trained_folder(recipe))  # the backbone's own may end elsewhere
        else:
            prepared.tokenizer.save_pretrained(trained_folder(recipe))  # the model is loaded without its backbone
    results = _describe_run(recipe, prepared, model)
    results["saved_bytes"] = sum(path.stat().st_size for path in trained_folder(recipe).glob("*.safetensors"))
    results |= {"steps": state.global_step, "epochs": state.epoch, "best_step": state.best_global_step}
    if prepared.untested is not None:
        with training_precision(recipe, prepared.arguments.device):
            results["untested"] = _measure(recipe, prepared, model, prepared.untested, "validation, untested rows")
        if prepared.arguments.should_save:
            _write_results(recipe, results)
        return results
    row = next(iter(prepared.tokenized["test"].values()))[0]["input_ids"][:_PLOTTED_TOKENS]
    is_hycam = recipe.method.name == "hycam"
    with training_precision(recipe, prepared.arguments.device):
        results = _measure_run(recipe, prepared, model, base) | results
        # every process takes part in a forward of a model that is in parts
        modulation = prompt_modulation(model, row, max_layers=_PLOTTED_LAYERS) if is_hycam else None
    if prepared.arguments.should_save:
        _write_results(recipe, results)
        _draw(recipe, prepared.tokenizer, row, modulation, results)
    return results


def _trainer(
    recipe: Recipe, prepared: PreparedRun, model: PeftModel | PreTrainedModel, on_signal: SaveOnSignal
) -> HyCAMTrainer:
    callbacks: list[TrainerCallback] = [MetricsFile(recipe.output_path / METRICS_FILE)]
    if recipe.early_stopping is not None:
        stopping = recipe.early_stopping
        callbacks.append(EarlyStoppingCallback(stopping.patience, stopping.threshold))
    if recipe.data.packing:
        callbacks.append(IsolatedRows())
    pad = prepared.tokenizer.pad_token_id
    return HyCAMTrainer(
        model=model,
        args=prepared.arguments,
        train_dataset=_training_rows(recipe, prepared),
        data_collator=_training_collator(recipe, prepared),
        validation=_validation_rows(prepared.tokenized["validation"], recipe.evaluation.max_validation_rows),
        evaluation_collator=Collator(pad),
        on_signal=on_signal,
        prepare_optimizer=recipe.method.prepare_optimizer,
        callbacks=callbacks,
    )


def _validation_rows(tasks: dict[str, Dataset], limit: int | None) -> dict[str, Dataset]:
    """At most `limit` rows of each task, evenly spaced."""
    if limit is None:
        return tasks
    counts = {name: min(limit, len(rows)) for name, rows in tasks.items()}
    return {
        name: rows.select([len(rows) * row // counts[name] for row in range(counts[name])])
        for name, rows in tasks.items()
    }


def _training_rows(recipe: Recipe, prepared: PreparedRun) -> Dataset | StreamedRows:
    if recipe.data.streaming is None:
        return training_set(prepared.tokenized["train"], recipe.data, recipe.seed)
    seed = recipe.seed if prepared.arguments.data_seed is None else prepared.arguments.data_seed
    group_size = prepared.arguments.train_batch_size * prepared.arguments.world_size
    return StreamedRows(recipe.tasks, recipe.data, seed, group_size)


def _training_collator(recipe: Recipe, prepared: PreparedRun) -> Collate:
    if recipe.data.streaming is None:
        return Collator(prepared.tokenizer.pad_token_id, packing=recipe.data.packing)
    return StreamCollator(prepared.tokenizer, recipe.data, prepared.num_embeddings)


def _fit(recipe: Recipe, trainer: HyCAMTrainer, checkpoint: Path | None, ended: Path | None) -> TrainerState:
    """Train from `checkpoint` on; the model ends with the best weights where the recipe asks for them.

    Args:
        ended: where a run that has ended left its weights: they are taken as they are.
    """
    folder = recipe.output_path
    state = None if checkpoint is None else checkpoint_state(checkpoint)
    if ended is not None:
        results = read_results(folder)
        assert results is not None
        state = TrainerState(results["epochs"], results["steps"], best_global_step=results["best_step"])
    elif state is not None and _is_finished(recipe, state):
        ended = checkpoint
        if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            ended = folder / Path(state.best_model_checkpoint).name
    if ended is not None:
        assert state is not None
        if trainer.is_deepspeed_enabled:
            # without an engine, which training alone makes, the weights are in parts
            raise InputError(f"--resume: the training is done; measure it with: hycam eval {folder} --adapter {ended}")
        trainer.load_weights(ended)
        if trainer.is_fsdp_enabled:  # training alone would place it, in parts
            trainer.adapted.to(trainer.args.device)
        return state
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except RunStoppedError as error:
        if trainer.on_signal.received is None:
            raise type(error)(f"{error}; {_kept(folder)}", error.exit_status) from error
    except InputError as error:  # a stream's, where it was read to a flaw; of a loader's worker, below its traceback
        flaw = str(error).splitlines()[-1].removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")
        raise InputError(f"{flaw}; {_kept(folder)}") from error
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
    return _measure(recipe, prepared, model, prepared.tokenized["test"], description, prepared.prompts)


def _measure(
    recipe: Recipe,
    prepared: PreparedRun,
    model: PeftModel | PreTrainedModel,
    tokenized: dict[str, Dataset],
    description: str,
    prompts: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    return measure(
        model,
        prepared.tokenizer,
        tokenized,
        prompts,
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


def _write_results(recipe: Recipe, results: dict[str, Any]) -> None:
    write_run_card(recipe, results)
    text = json.dumps(finite(results), indent=2, allow_nan=False) + "\n"
    write_whole(recipe.output_path / RESULTS_FILE, text)
