"""What the trainer that calls a model averages over, read off the trainer itself.

transformers' `Trainer`, and TRL's, which derive from it, may make the loss outside the model and divide it by the
target tokens or the micro-batches of a whole optimizer step. No argument takes these numbers to the model, and a model
is never handed its trainer, so the trainer is looked for among the callers, in the frame of its `training_step`.
"""

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

# the methods of trainers that call a model: a step, and TRL's passes of the reference before the first one
_CALLERS = ("training_step", "compute_ref_log_probs")
# the losses of TRL's GRPO that are summed over tokens and divided by those of all completions of the step
_LOSSES_OVER_TOKENS = ("cispo", "dapo", "vespo")


class StepAverage(NamedTuple):
    """A micro-batch's part in what a trainer averages over in one optimizer step.

    Attributes:
        share: this micro-batch's part where the model's own loss is divided by what the whole step counts; 1 where
            the trainer divides it afterwards, which the gradient that reaches the loss tells.
        weight: the factor that the micro-batch's mean loss has in what the backward pass starts from, for a loss whose
            gradient tells nothing: the part of the step, times the processes over whose gradients the mean is
            taken, times the loss scaler's scale.
    """

    share: Tensor | float
    weight: Tensor | float


class CallingTrainer:
    """A trainer in one of whose methods a model is being called."""

    def __init__(self, trainer: Any, caller: FrameType) -> None:
        self._trainer = trainer
        self._caller = caller

    @property
    def compares(self) -> bool:
        """Whether its loss is made of ratios of the probabilities that two passes give."""
        return hasattr(self._trainer, "ref_model")

    @property
    def name(self) -> str:
        return type(self._trainer).__name__

    def average(self, is_shifted: bool) -> StepAverage | None:
        """What the micro-batch of this call weighs in the step; None where the trainer counts targets that can't be
        found. `is_shifted`: whether each position's target is the next one's label.
        """
        step, scale = self._caller.f_locals, self._loss_scale()
        batch, num_items = step.get("inputs"), step.get("num_items_in_batch")
        # unless its user has said that the loss is a mean over the micro-batch, which the trainer then divides
        if num_items is not None and getattr(self._trainer, "loss_is_scaled_for_ga", None) is not False:
            targets = self._targets(is_shifted)
            if targets is None:
                return None
            part = share(targets, num_items)
            return StepAverage(part, part * (self._processes() * scale))
        if isinstance(batch, Mapping) and getattr(self._trainer, "loss_type", None) in _LOSSES_OVER_TOKENS:
            return StepAverage(1.0, self._share_of_completions(batch) * scale)
        return StepAverage(1.0, scale / self._trainer.current_gradient_accumulation_steps)

    def _targets(self, is_shifted: bool) -> Tensor | None:
        """The micro-batch's targets, counted as the trainer counts the step's.

        They are the training loop's, since the trainer may have taken the labels off the copy that its step has.
        """
        frame = self._caller.f_back
        while frame is not None and frame.f_code.co_name != "train":
            inputs = frame.f_locals.get("inputs")
            if isinstance(inputs, Mapping) and (count := target_count(inputs, is_shifted)) is not None:
                return count
            frame = frame.f_back
        return None

    def _share_of_completions(self, batch: Mapping[str, Any]) -> Tensor:
        """This micro-batch's part of the completions' tokens, as `GRPOTrainer._compute_loss` divides by them."""
        trainer, mask = self._trainer, batch["completion_mask"]
        if "tool_mask" in batch:
            mask = mask * batch["tool_mask"]
        steps = trainer.current_gradient_accumulation_steps / trainer.args.steps_per_generation
        return mask.sum() / (batch["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes * steps)

    def _processes(self) -> int:
        """The factor by which a loss that is divided by the tokens of all processes is multiplied."""
        if not self._trainer.args.average_tokens_across_devices:
            return 1
        return self._trainer.accelerator.num_processes // self._trainer.get_tp_size()

    def _loss_scale(self) -> Tensor | float:
        """What float16's scaler multiplies the loss by; torch's is read on the device."""
        accelerator = self._trainer.accelerator
        if accelerator.scaler is not None:
            return accelerator.scaler.scale(torch.ones((), device=self._trainer.args.device))
        wrapped = getattr(accelerator, "deepspeed_engine_wrapped", None)
        return wrapped.engine.optimizer.loss_scale if wrapped is not None and wrapped.engine.fp16_enabled() else 1.0


def calling_trainer() -> CallingTrainer | None:
    """The trainer in whose methods this is called, or None."""
    # without its module there is none, and importing it takes seconds
    module = sys.modules.get("transformers.trainer")
    frame = None if module is None else sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in _CALLERS:
            trainer = frame.f_locals.get("self")
            if isinstance(trainer, module.Trainer):  # type: ignore[union-attr]
                return CallingTrainer(trainer, frame)
        frame = frame.f_back
    return None


@torch.compiler.assume_constant_result
def traced_trainer() -> str:
    """Which trainer a graph is being traced under: "", "any", or "compares" (`CallingTrainer.compares`)."""
    trainer = calling_trainer()
    return "" if trainer is None else "compares" if trainer.compares else "any"


@torch.library.custom_op("hycam::step_average", mutates_args=())
def step_average(like: Tensor, is_shifted: bool) -> Tensor:
    """`CallingTrainer.average` for a graph, read when it runs: float32 [2], on the device of `like`."""
    trainer = calling_trainer()
    average = None if trainer is None else trainer.average(is_shifted)
    if average is None:
        raise RuntimeError(
            "a model that was compiled under a trainer is called outside its training_step, or the trainer's labels "
            "can't be found: the balance loss's weight is unknown; call torch.compiler.reset() before another use"
        )
    return torch.stack([torch.as_tensor(value, device=like.device, dtype=torch.float32) for value in average])


@step_average.register_fake
def _(like: Tensor, is_shifted: bool) -> Tensor:
    return like.new_empty(2, dtype=torch.float32)


def share(targets: Tensor, num_items: Tensor | int) -> Tensor:
    """`targets` of `num_items`, 0 where there are none."""
    if isinstance(num_items, Tensor):
        return targets.to(num_items.device) / num_items.clamp(min=1)
    return targets / max(num_items, 1)


def target_count(inputs: Mapping[str, Any], is_shifted: bool) -> Tensor | None:
    """The targets among a micro-batch's labels, None without labels."""
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = inputs.get("labels")
        if isinstance(labels, Tensor) and is_shifted:
            labels = labels[..., 1:]
    return (labels != -100).sum() if isinstance(labels, Tensor) else None


def shifts_labels(model: nn.Module) -> bool:
    """Whether each position's target is the next one's label, by the loss that transformers has for a model."""
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "")
    return loss is ForCausalLMLoss and not is_encoder_decoder
