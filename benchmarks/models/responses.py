"""Training steps whose loss reads responses alone, on rows of the study's lengths.

With the logits of every token and transformers' own trainer's loss; with those of the targets and the loss of
`hycam train`; and that on batches of rows alike in length, which the study's recipe makes.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from benchmarks.harness.session import Session, dtype_name, on_threads
from benchmarks.harness.timing import Work
from benchmarks.models.backbones import ModelShape
from benchmarks.models.measure import Timing, measure_methods
from benchmarks.models.training import TrainingStep, adapted, base_model, without_noise
from benchmarks.op.checks import Results, WrongResultError, compare, generator_state, results
from hycam.data.collation import Collator
from hycam.data.sampling import EpochSampler
from hycam.data.tokenization import IGNORED_LABEL
from hycam.training.callbacks import SaveOnSignal
from hycam.training.trainer import HyCAMTrainer

ALL, TARGETS, GROUPED = "all-logits", "target-logits", "target-logits, grouped"
PEERS = (ALL, TARGETS, GROUPED)

_ROWS = Path(__file__).with_name("rows.json")
_MAX_LENGTH = 192  # of the rows
_STEPS = 8  # of all that the rows make

Batch = dict[str, Tensor]


class _AllLogits(HyCAMTrainer):
    """Takes the model's own loss of all tokens, most of whose labels may say that they are no targets."""

    compute_loss = Trainer.compute_loss

    @contextmanager
    def narrow_loss(self) -> Iterator[None]:
        yield


_TRAINERS = {ALL: _AllLogits, TARGETS: HyCAMTrainer, GROUPED: HyCAMTrainer}


class ResponseLoss:
    """A trainer's loss of a batch, as the mean over its responses' tokens.

    Args:
        peer: one of `PEERS`.
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

    def __call__(self, batch: Batch) -> Tensor:
        with self._trainer.narrow_loss():
            return self._trainer.compute_loss(self._trainer.adapted, dict(batch))


def batches(peer: str, shape: ModelShape, device: torch.device) -> list[Batch]:
    """`_STEPS` of the batches that a peer's order makes of the study's rows, spread over their sizes, the widest first.

    Tokens are random. Lengths are the study's, in proportion to the shape's.
    """
    scale = shape.length / _MAX_LENGTH
    rows = [[round(scale * tokens) for tokens in row] for row in json.loads(_ROWS.read_text())["rows"]]
    order = EpochSampler(len(rows), 0, lambda: 0, [row[1] for row in rows] if peer == GROUPED else None, shape.batch)
    shuffled = [rows[index] for index in order]
    groups = [shuffled[begin : begin + shape.batch] for begin in range(0, len(rows) - shape.batch + 1, shape.batch)]
    groups.sort(key=lambda group: sum(tokens for _, tokens in group))
    chosen = [groups[(2 * index + 1) * len(groups) // (2 * _STEPS)] for index in range(_STEPS)]
    chosen.sort(key=_width, reverse=True)
    return [_batch(lengths, shape, device, seed) for seed, lengths in enumerate(chosen)]


def _width(lengths: Sequence[Sequence[int]]) -> tuple[int, int]:
    """A batch's length, and its targets."""
    return max(tokens for _, tokens in lengths), sum(tokens - prompt for prompt, tokens in lengths)


def _batch(lengths: Sequence[Sequence[int]], shape: ModelShape, device: torch.device, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt, tokens in lengths:
        ids = torch.randint(shape.config.vocab_size, (tokens,), generator=generator)
        rows.append({"input_ids": ids, "labels": F.pad(ids[prompt:], (prompt, 0), value=IGNORED_LABEL)})
    return {name: values.to(device) for name, values in Collator(0)(rows).items()}


class ResponseSteps(TrainingStep):
    """Training steps with a `ResponseLoss`, one on each of the `batches`."""

    def __init__(self, peer: str, name: str, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(name, shape, dtype, device)
        self.inputs = batches(peer, shape, device)
        self._loss = ResponseLoss(peer, self.model, device)
        self._loss_of_all_logits = ResponseLoss(ALL, self.model, device)

    def forward(self, index: int) -> Tensor:
        return self._loss(self.inputs[index])

    def work(self) -> Work:
        def run(indices: Sequence[int]) -> None:
            for index in indices:
                self.run(index)

        return Work(lambda _: range(_STEPS), run, 1)

    def found(self) -> dict[str, float]:
        """Of all batches the ``tokens``, without padding; of the first its ``targets`` and what a step makes of it.

        That is the ``loss``, what transformers' own is of all logits, and of how many places there are ``logits``.
        """
        first, places = self.inputs[0], list[int]()
        projection = base_model(self.model).get_output_embeddings()
        with generator_state(first["labels"].device):
            all_logits_loss = self._loss_of_all_logits(first).item()
        note = projection.register_forward_hook(lambda _, args, output: places.append(output.shape[:-1].numel()))
        with generator_state(first["labels"].device):
            loss = self.forward(0).item()
        note.remove()
        tokens = sum(int(batch["attention_mask"].sum()) for batch in self.inputs)
        targets = int((first["labels"] != IGNORED_LABEL).sum())
        logits = sum(places)
        return {
            "tokens": tokens, "targets": targets, "logits": logits, "loss": loss, "all_logits_loss": all_logits_loss
        }  # fmt: skip


def check_responses(peer: str, name: str, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> None:
    """Check a loss and its gradients against those of all logits in float64: two layers of the width, without noise.

    Raises:
        WrongResultError: as `checks.compare`, or logits of other tokens are made than the peer's name says.
    """
    cut = shape.cut()
    batch = batches(peer, cut, device)[0]
    truth, plain = (_results(ALL, name, cut, dtype, batch, computed_in) for computed_in in (torch.float64, dtype))
    compare(f"{name}, {peer}", _results(peer, name, cut, dtype, batch, dtype), truth, plain)
    found = ResponseSteps(peer, name, cut, dtype, device).found()
    # the last place of a row has no next token: it is that of no target, and the trainer's loss asks for one more
    wanted = batch["labels"].numel() if peer == ALL else found["targets"] + 1
    if found["logits"] != wanted:
        raise WrongResultError(f"{name}, {peer}: logits of {found['logits']} tokens, wanted {wanted}: not timed")


def _results(
    peer: str, name: str, shape: ModelShape, dtype: torch.dtype, batch: Batch, computed_in: torch.dtype
) -> Results:
    device = batch["labels"].device
    model = without_noise(adapted(name, shape, dtype, device)).to(computed_in)
    loss = ResponseLoss(peer, model, device)
    return results(lambda _: (loss(batch),), dict(model.named_parameters()))


def measure_responses(
    session: Session, shape: ModelShape, dtype: torch.dtype, name: str, seconds: float = 50.0
) -> None:
    """The steps' time and bytes on one thread by peer; the method is the setting. Of bytes, the widest batch's."""
    labels = {"dtype": dtype_name(dtype), "setting": name, "threads": 1}

    def make(peer: str) -> list[Timing]:
        check_responses(peer, name, shape, dtype, session.device)
        steps = ResponseSteps(peer, name, shape, dtype, session.device)
        found = steps.found() | steps.memory()
        session.add("memory", shape, **labels, what="targets", peer=peer, **found)
        return [("steps", session.timers[-1], steps.work)]

    with on_threads(1):
        measure_methods(session, "targets", shape, labels, PEERS, make, seconds)
