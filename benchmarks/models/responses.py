"""A training step whose loss reads responses alone: with the logits of every token, and with those of the targets.

Both losses are a trainer's: transformers' own, and that of `hycam train`.
"""

from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from benchmarks.harness.session import Session, dtype_name, on_threads
from benchmarks.models.backbones import ModelShape
from benchmarks.models.measure import Timing, measure_methods
from benchmarks.models.training import TrainingStep, adapted, base_model, token_ids, without_noise
from benchmarks.op.checks import Results, WrongResultError, compare, generator_state, results
from hycam.data.collation import Collator
from hycam.training.callbacks import SaveOnSignal
from hycam.training.trainer import HyCAMTrainer

# of the tokens of the study's rows, before any is cut: docs/study/data/tokens.json
PROMPT_SHARE = 0.44
ALL, TARGETS = "all-logits", "target-logits"


class _AllLogits(HyCAMTrainer):
    """Takes the model's own loss of all tokens, most of whose labels may say that they are no targets."""

    compute_loss = Trainer.compute_loss


_TRAINERS = {ALL: _AllLogits, TARGETS: HyCAMTrainer}


class ResponseLoss:
    """A trainer's loss of rows that are prompts by `PROMPT_SHARE`, as the mean over their responses' tokens.

    Args:
        peer: `ALL` or `TARGETS`, what the model makes the logits of.
    """

    def __init__(self, peer: str, model: nn.Module, device: torch.device) -> None:
        with TemporaryDirectory() as folder:  # a trainer makes its folder at once
            self._trainer = _TRAINERS[peer](
                model=model,
                args=TrainingArguments(folder, use_cpu=device.type == "cpu", report_to="none"),
                validation={},
                evaluation_collator=Collator(0),
                on_signal=SaveOnSignal(),
                prepare_optimizer=lambda optimizer, model: None,
            )

    def __call__(self, ids: Tensor) -> Tensor:
        """The loss of ids [batch, length]."""
        labels = ids.clone()
        labels[:, : prompt_tokens(ids.shape[1])] = -100
        with self._trainer.target_logits:
            return self._trainer.compute_loss(self._trainer.adapted, {"input_ids": ids, "labels": labels})


def prompt_tokens(length: int) -> int:
    return round(PROMPT_SHARE * length)


class ResponseStep(TrainingStep):
    """A training step with a `ResponseLoss`."""

    def __init__(self, peer: str, name: str, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(name, shape, dtype, device)
        self.targets = shape.batch * (shape.length - prompt_tokens(shape.length))
        self._loss = ResponseLoss(peer, self.model, device)

    def forward(self, index: int) -> Tensor:
        return self._loss(self.batches[index % len(self.batches)])

    def first(self) -> dict[str, float]:
        """The ``loss`` of the first batch, and of how many places the model makes ``logits`` for it."""
        places: list[int] = []
        projection = base_model(self.model).get_output_embeddings()
        note = projection.register_forward_hook(lambda _, args, output: places.append(output.shape[:-1].numel()))
        with generator_state(self.batches[0].device):
            loss = self.forward(0).item()
        note.remove()
        return {"loss": loss, "logits": sum(places), "targets": self.targets}


def check_responses(peer: str, name: str, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> None:
    """Check a loss and its gradients against those of all logits in float64: two layers of the width, without noise.

    Raises:
        WrongResultError: as `checks.compare`, or logits of other tokens are made than the peer's name says.
    """
    cut = shape.cut()
    truth = _results(ALL, name, cut, dtype, device, torch.float64)
    compare(f"{name}, {peer}", _results(peer, name, cut, dtype, device), truth, _results(ALL, name, cut, dtype, device))
    found = ResponseStep(peer, name, cut, dtype, device).first()
    # the last place of a row has no next token: it is that of no target, and the trainer's loss asks for one more
    wanted = {ALL: cut.tokens, TARGETS: found["targets"] + 1}[peer]
    if found["logits"] != wanted:
        raise WrongResultError(f"{name}, {peer}: logits of {found['logits']} tokens, wanted {wanted}: not timed")


def _results(
    peer: str,
    name: str,
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    computed_in: torch.dtype | None = None,
) -> Results:
    model = without_noise(adapted(name, shape, dtype, device)).to(computed_in or dtype)
    loss, ids = ResponseLoss(peer, model, device), token_ids(shape, device)
    return results(lambda _: (loss(ids),), dict(model.named_parameters()))


def measure_responses(
    session: Session, shape: ModelShape, dtype: torch.dtype, name: str, seconds: float = 50.0
) -> None:
    """A step's time and bytes on one thread by what the model makes logits of; the method is the setting."""
    labels = {"dtype": dtype_name(dtype), "setting": name, "threads": 1}

    def make(peer: str) -> list[Timing]:
        check_responses(peer, name, shape, dtype, session.device)
        step = ResponseStep(peer, name, shape, dtype, session.device)
        found = step.first() | step.memory()
        session.add("memory", shape, **labels, what="targets", peer=peer, **found)
        return [("step", session.timers[-1], step.work)]

    with on_threads(1):
        measure_methods(session, "targets", shape, labels, (ALL, TARGETS), make, seconds)
