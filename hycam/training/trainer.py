"""The HF Trainer with exact per-task validation, which stops on a loss that is not finite."""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hycam.errors import RunStoppedError
from hycam.evaluation import evaluate_perplexity
from hycam.evaluation.batches import Collate
from hycam.training.callbacks import FiniteGradients, LossWindow, SaveOnSignal, layer_statistics
from hycam.training.measure import own_draws

_TRAINER_STATE = "trainer_state.json"
_TRAINING_ARGUMENTS = "training_args.bin"


class HyCAMTrainer(Trainer):
    """HF Trainer for a PEFT model, or a whole one, on several tasks.

    Args:
        validation: tokenized validation rows per task.
        evaluation_collator: collates them (training may pack, evaluation does not).
        on_signal: saves and stops on a signal, between two batches of a validation too.
        prepare_optimizer: is given the optimizer, as soon as it is made, and the model.
        callbacks: more of them.
        **kwargs: what `transformers.Trainer` takes.
    """

    def __init__(
        self,
        *,
        validation: Mapping[str, Dataset],
        evaluation_collator: Collate,
        on_signal: SaveOnSignal,
        prepare_optimizer: Callable[[torch.optim.Optimizer, nn.Module], None],
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            eval_dataset=dict(validation), callbacks=[LossWindow(), FiniteGradients(), on_signal, *callbacks], **kwargs
        )
        assert self.model is not None
        self.adapted: nn.Module = self.model
        self.validation = dict(validation)
        self.evaluation_collator = evaluation_collator
        self.on_signal = on_signal
        self.prepare_optimizer = prepare_optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer, with what the method changes in it."""
        made_before = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not made_before:
            self.prepare_optimizer(optimizer, self.adapted)
        return optimizer

    def load_weights(self, checkpoint: Path) -> None:
        """Give the model a checkpoint's weights, without training on."""
        if isinstance(self.adapted, PeftModel):
            set_peft_model_state_dict(self.adapted, load_peft_weights(str(checkpoint), device="cpu"))
        else:
            self._load_from_checkpoint(str(checkpoint))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch. Raises `RunStoppedError` before the optimizer sees a loss that is not finite."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise RunStoppedError(f"the loss is {loss.item()} at step {self.state.global_step + 1}")
        self._loss_window.total = self._loss_window.total + loss
        return loss

    @property
    def _loss_window(self) -> LossWindow:
        # looked up each time: on resuming, the Trainer puts the checkpoint's callback in the place of the one given
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, LossWindow))

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Token-weighted loss and perplexity, per task and overall (`eval_loss`, `eval_perplexity`).

        Args:
            eval_dataset: token rows per task; the validation rows by default.
        """
        tasks: Mapping[str, Dataset] = self.validation if eval_dataset is None else eval_dataset
        rows = sum(len(dataset) for dataset in tasks.values())
        quiet = self.args.disable_tqdm or not self.is_world_process_zero()
        with tqdm(total=rows, desc="validation", unit="row", leave=False, disable=quiet) as bar:

            def progress(done: int) -> None:
                bar.update(done)
                if self.is_in_train and self.on_signal.received is not None:
                    raise _EvaluationInterruptedError

            try:
                with own_draws(self.args.seed, self.args.device):
                    report = evaluate_perplexity(
                        self.adapted,
                        tasks,
                        self.evaluation_collator,
                        batch_size=self.args.per_device_eval_batch_size,
                        progress=progress,
                    )
            except _EvaluationInterruptedError:
                self._save_checkpoint(self.adapted, trial=None)
                raise RunStoppedError("a signal came during validation") from None
        metrics = perplexity_metrics(report, metric_key_prefix)
        if not math.isfinite(metrics[f"{metric_key_prefix}_loss"]):
            raise RunStoppedError(f"the validation loss is not finite at step {self.state.global_step}")
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the training loss as the mean since the last log, in an earlier process too, and the balance loss."""
        if "loss" in logs:
            window, step = self._loss_window, self.state.global_step
            total = torch.as_tensor(window.total, device=self.args.device)
            logs["loss"] = self.accelerator.reduce(total, reduction="mean").item() / (step - window.since)
            window.total, window.since = 0.0, step
            layers = layer_statistics(self.adapted).values()
            if layers:
                logs["balance_loss"] = sum(layer["balance_loss"] for layer in layers) / len(layers)
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        # a pickle that nothing here reads: the run's recipe.yaml says the same
        folder = output_dir or self.args.output_dir
        assert folder is not None
        Path(folder, _TRAINING_ARGUMENTS).unlink(missing_ok=True)


class _EvaluationInterruptedError(Exception):
    """A signal came between two batches of an evaluation."""


def perplexity_metrics(report: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The Trainer's flat metrics from what `evaluate_perplexity` returns."""
    metrics: dict[str, float] = {}
    for name, result in [("", report["overall"]), *((f"{task}_", r) for task, r in report["tasks"].items())]:
        metrics[f"{prefix}_{name}loss"] = result["nll"] / result["tokens"]
        metrics[f"{prefix}_{name}perplexity"] = result["perplexity"]
    return metrics


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, None without one; those that a kill left half-written are removed.

    The Trainer writes a checkpoint's `trainer_state.json` last, so a checkpoint is whole where that file can be read.
    """
    whole: list[tuple[int, Path]] = []
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        state = checkpoint_state(folder)
        if state is None:
            shutil.rmtree(folder)
        else:
            whole.append((state.global_step, folder))
    return max(whole)[1] if whole else None


def checkpoint_state(folder: Path) -> TrainerState | None:
    """The Trainer's state in a checkpoint, None where it is missing or cut short."""
    try:
        return TrainerState.load_from_json(str(folder / _TRAINER_STATE))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
