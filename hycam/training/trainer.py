"""The HF Trainer with exact per-task validation, which stops on a loss that is not finite."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from hycam.data.sampling import EpochSampler
from hycam.data.streaming import StreamedRows
from hycam.errors import NotFiniteError, RunStoppedError
from hycam.evaluation.batches import Collate
from hycam.evaluation.perplexity import evaluate_perplexity
from hycam.evaluation.targets import TargetLogits, find_targets, target_nll, uniform_gaps
from hycam.reliances import warn_where_broken
from hycam.training.callbacks import (
    DueValidation,
    FiniteGradients,
    LossWindow,
    SaveOnSignal,
    Throughput,
    layer_statistics,
)
from hycam.training.checkpoints import TRAINER_STATE, UNFINISHED_FOLDER, list_files
from hycam.training.engines import limit_deepspeed_waits, whole
from hycam.training.loss import check_loss, loss_by_parts
from hycam.training.measure import own_draws, perplexity_metrics
from hycam.training.progress import ProgressLines, progress_bar

warn_where_broken("transformers")

_TRAINING_ARGUMENTS = "training_args.bin"
_Kind = TypeVar("_Kind", bound=TrainerCallback)


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
        self.throughput = Throughput()
        super().__init__(
            eval_dataset=dict(validation),
            callbacks=[LossWindow(), FiniteGradients(), self.throughput, on_signal, DueValidation(), *callbacks],
            **kwargs,
        )
        for theirs in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):
            self.remove_callback(theirs)
        self.add_callback(ProgressLines())
        assert self.model is not None
        self.adapted: nn.Module = self.model
        self.validation = dict(validation)
        self.evaluation_collator = evaluation_collator
        self.on_signal = on_signal
        self.prepare_optimizer = prepare_optimizer
        self._run_folder = Path(self.args.output_dir or "")
        self._saved_step: int | None = None  # the step of the newest checkpoint
        self._target_logits = TargetLogits(self.adapted)
        self._is_loss_known = False
        # the Trainer's way keeps the labels from the model, which then couldn't weigh its balance loss
        self.label_smoother = None

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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # the Trainer has PEFT load an adapter anew, which makes float32 weights of 16 bits
        if isinstance(self.adapted, PeftModel) and not self.is_fsdp_enabled:
            self.load_weights(Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if isinstance(self.adapted, PeftModel) and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            assert best is not None
            self.load_weights(Path(best))
        else:
            super()._load_best_model()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self.narrow_loss():
            return super().train(*args, **kwargs)

    @contextmanager
    def narrow_loss(self) -> Iterator[None]:
        """`compute_loss` wants it entered: only targets' logits are made, and raised to float32 a part at a time."""
        with self._target_logits, loss_by_parts(self.adapted):
            yield

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            # accelerate hands the plugin to GPUs and the like alone; on CPUs it would train unsharded, and not say so
            state = self.accelerator.state
            # both: every new state object takes the type from the partial one
            PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            if state.mixed_precision != "no":
                state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
            self.is_fsdp_enabled = True

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_deepspeed_enabled:
            limit_deepspeed_waits(self.args.ddp_timeout)
        window = self._callback(LossWindow)
        if window.totals:  # of the checkpoint that training goes on from
            window.total, self._saved_step = window.totals[self.args.process_index], self.state.global_step
        return prepared

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        assert isinstance(rows, Dataset)
        strategy = self.args.train_sampling_strategy
        if strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(rows)
        return EpochSampler(
            len(rows),
            self.args.seed if self.args.data_seed is None else self.args.data_seed,
            lambda: int(self.state.epoch or 0),
            [len(ids) for ids in rows["input_ids"]] if strategy == "group_by_length" else None,
            self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """A step's micro-batches, counted for the log."""
        self.throughput.begin()
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self.throughput.count(batches)
        if num_items is not None:  # where no row of a stream has room for a response, the loss is 0, not 0 / 0
            num_items = torch.as_tensor(num_items).clamp(min=1)
        return batches, num_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The model's own loss, smoothed by `label_smoothing_factor`: (1 - factor) nll + factor uniform nll.

        The logits are those of the targets alone, except under liger, whose loss makes none.

        Raises:
            InputError: the model's own loss is not the cross-entropy of the next token.
        """
        if self.args.use_liger_kernel:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        targets, shape = find_targets(inputs["labels"], inputs.get("position_ids")), inputs["labels"].shape
        is_narrow = self._target_logits.is_possible
        if is_narrow:
            # the model's own loss compares each place with the next one's label, so the last needs one beyond it
            inputs = {**inputs, "labels": F.pad(targets.ids, (1, 0), value=-100)[None]}
        with self._target_logits.at(F.pad(targets.positions, (0, 1)), shape):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        logits = outputs["logits"].flatten(0, -2)
        logits = logits[:-1] if is_narrow else logits[targets.positions.to(logits.device)]
        ids = targets.ids.to(logits.device)
        if not self._is_loss_known and len(ids):
            check_loss(
                self.adapted, outputs, loss, self._averaged(target_nll(logits.detach(), ids), num_items_in_batch)
            )
            self._is_loss_known = True
        if self.args.label_smoothing_factor:
            gap = self._averaged(uniform_gaps(logits, ids), num_items_in_batch)
            loss = loss + self.args.label_smoothing_factor * gap
        return (loss, outputs) if return_outputs else loss

    def _averaged(self, losses: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        """What the Trainer makes of the losses [targets] of a micro-batch's targets."""
        if not self.model_accepts_loss_kwargs or num_items_in_batch is None:
            return losses.mean()
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return losses.sum() * processes / num_items_in_batch

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch.

        Raises:
            NotFiniteError: before the optimizer's step, where the loss of one of its micro-batches is not finite.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)
        window = self._callback(LossWindow)
        window.total = total = window.total + loss
        # once a step, for reading it waits for the device: a loss that is not finite leaves no sum finite
        if self.accelerator.sync_gradients and not torch.isfinite(total):
            raise NotFiniteError(f"the loss is {total.item()} at step {self.state.global_step + 1}")
        if self.is_deepspeed_enabled and not self.args.fp16:
            # its step is part of the backward pass, and hides the gradients from callbacks
            engine: Any = self.deepspeed
            norm = engine.get_global_grad_norm()
            if norm is not None and not math.isfinite(norm):
                raise NotFiniteError(f"the gradient is not finite at step {self.state.global_step + 1}")
        return loss

    def _callback(self, kind: type[_Kind]) -> _Kind:
        # looked up each time: on resuming, the Trainer puts the checkpoint's callback in the place of the one given
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, kind))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._make_up_for_validation()
        if isinstance(self.train_dataset, StreamedRows):
            # the rows of the batches that the Trainer takes and lets go
            micro_batches = self.state.global_step * self.args.gradient_accumulation_steps
            self.train_dataset.skipped = micro_batches * self.train_dataset.group_size
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._make_up_for_validation()  # no epoch is left after the last step
        return super()._finalize_training(*args, **kwargs)

    def _make_up_for_validation(self) -> None:
        """Make the validation that a signal kept from the step that training goes on from, with all that follows it.

        The checkpoint stays as it is: a run that is stopped or killed before the next one begins here once more.
        """
        if not self._callback(DueValidation).due:
            return
        self._determine_best_metric(self._evaluate(None, None), None)
        self._name_best_checkpoint()
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        if skip_scheduler and self.state.global_step > 0:
            return {}  # `eval_on_start` belongs to the beginning of a run, not to where it goes on
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

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
        bar = progress_bar(rows, "validation", "row", quiet=quiet, leave=False)
        with self.throughput.spending_on("validation"), bar:

            def progress(done: int) -> None:
                bar.update(done)
                if self.is_in_train and self.on_signal.agree(self.args.device) is not None:
                    raise _EvaluationInterruptedError

            try:
                progress(0)  # whoever sends SIGTERM waits seconds, an evaluation may take minutes
                with own_draws(self.args.seed, self.args.device):
                    report = evaluate_perplexity(
                        self.adapted,
                        tasks,
                        self.evaluation_collator,
                        batch_size=self.args.per_device_eval_batch_size,
                        progress=progress,
                        distributed=True,
                    )
            except _EvaluationInterruptedError:
                self._save_checkpoint(self.adapted, trial=None)
                raise RunStoppedError("a signal came during validation") from None
        metrics = perplexity_metrics(report, metric_key_prefix)
        if not math.isfinite(metrics[f"{metric_key_prefix}_loss"]):
            raise NotFiniteError(f"the validation loss is not finite at step {self.state.global_step}")
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the training loss as the mean since the last log, in an earlier process too.

        Beside it the balance loss, and what `Throughput.take` gives.
        """
        if "loss" in logs:
            window, step = self._callback(LossWindow), self.state.global_step
            total = torch.as_tensor(window.total, device=self.args.device)
            logs["loss"] = self.accelerator.reduce(total, reduction="mean").item() / (step - window.since)
            window.total, window.since = 0.0, step
            layers = layer_statistics(self.adapted).values()
            if layers:
                logs["balance_loss"] = sum(layer["balance_loss"] for layer in layers) / len(layers)
        if "loss" in logs or ("train_runtime" in logs and self.throughput.positions):  # the end, after steps not logged
            logs |= self.throughput.take(self.args.device)
        if "train_runtime" in logs:
            logs |= {f"{what}_seconds": seconds for what, seconds in self.throughput.spent.items()}
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._run_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's checkpoint, written beside the others and given its name when every process has done its part.

        A process that is killed before leaves the earlier checkpoints as they were. A step is saved once: nothing that
        a second checkpoint of it would hold has changed.
        """
        folder, state = self._run_folder, self.state
        if state.global_step == self._saved_step:
            return
        window = self._callback(LossWindow)
        total = torch.as_tensor(window.total, dtype=torch.float32, device=self.args.device)
        window.totals = self.accelerator.gather(total.reshape(1)).tolist()
        self._run_folder = folder / UNFINISHED_FOLDER
        with self.throughput.spending_on("checkpoints"):
            super()._save_checkpoint(model, trial)
        self._run_folder = folder
        self.accelerator.wait_for_everyone()
        self._saved_step = state.global_step
        self._name_best_checkpoint()
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self.args.should_save:
            staged = folder / UNFINISHED_FOLDER / name
            state.save_to_json(str(staged / TRAINER_STATE))
            list_files(staged)
            staged.rename(folder / name)
            staged.parent.rmdir()
            rotate_checkpoints(str(folder), self.args.save_total_limit, state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _name_best_checkpoint(self) -> None:
        state = self.state
        if state.best_global_step is not None:
            best = self._run_folder / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            known = state.best_global_step == self._saved_step or best.is_dir()
            state.best_model_checkpoint = str(best) if known else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter (or the model), whole, whichever engine has it in parts; every process calls this.

        The Trainer's own way gathers the backbone too, and under ZeRO-3 it leaves a frozen router out.
        """
        adapter_prefix = getattr(self.adapted.base_model, "prefix", "")
        parameters = {
            name: parameter
            for name, parameter in self.adapted.named_parameters()
            if parameter.requires_grad or adapter_prefix in name
        }
        if self.is_deepspeed_enabled:
            import deepspeed

            with deepspeed.zero.GatheredParameters(list(parameters.values())):
                self._save(output_dir)
        elif self.is_fsdp_enabled:
            self._save(output_dir, {name: whole(parameter) for name, parameter in parameters.items()})
        else:
            self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        super()._save(output_dir, state_dict)
        # a pickle that nothing here reads: the run's recipe.yaml says the same
        folder = output_dir or self.args.output_dir
        assert folder is not None
        Path(folder, _TRAINING_ARGUMENTS).unlink(missing_ok=True)


class _EvaluationInterruptedError(Exception):
    """A signal came between two batches of an evaluation."""
