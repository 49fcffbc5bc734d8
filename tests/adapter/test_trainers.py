"""The balance loss weighs the same under every trainer: by the micro-batches' parts of what it averages over."""

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import hycam
from tests.adapter.balance_probe import TOLERANCE, Probe, new_adapter, router_gradient
from tests.models import tiny_config, tiny_model

LENGTH = 12


def rows(count=8, seed=0):
    """Rows of uneven lengths, padded, whose prompts have no targets."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        tokens, prompt = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((6, 13), (0, 5)))
        ids = torch.randint(3, 128, (LENGTH,), generator=generator)
        mask = (torch.arange(LENGTH) < tokens).long()
        labels = ids.masked_fill((mask == 0) | (torch.arange(LENGTH) < prompt), -100)
        made.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return made


def settings(folder, steps, **others):
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 1,
            "gradient_accumulation_steps": steps,
            "learning_rate": 0.0,
            "max_grad_norm": 0,
            "train_sampling_strategy": "sequential",
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        | others
    )


def train(trainer_class, model, data, folder, steps, *, label_smoothing_factor=0.0, arguments=None, **options):
    """One optimizer step over all rows, in `steps` micro-batches; returns the probe."""
    probe = Probe(model)
    size = len(data) // steps
    given = {"per_device_train_batch_size": size, "label_smoothing_factor": label_smoothing_factor} | (arguments or {})
    arguments = settings(folder, steps, **given)
    trainer_class(model, arguments, train_dataset=data, callbacks=[probe], **options).train()
    return probe


def shares(data, steps, count):
    size = len(data) // steps
    counts = [sum(count(row) for row in data[start : start + size]) for start in range(0, len(data), size)]
    return [part / sum(counts) for part in counts]


def targets(row):
    return int((row["labels"][1:] != -100).sum())


def mean_over_step(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


class OwnLoss(Trainer):
    """Makes the loss itself, and takes the labels off the batch by a name of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        wanted = inputs.pop("labels")
        outputs = model(**inputs)
        loss = mean_over_step(outputs, wanted, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class OwnLossBesideTheModels(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = mean_over_step(outputs, inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class MicroBatchMean(Trainer):
    """Has the model make a mean over the micro-batch, which `loss_is_scaled_for_ga` lets the trainer divide."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class OwnMicroBatchMean(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        return cross_entropy(logits, labels[:, 1:].flatten())


def loss_path(name, model):
    """Trainer class and options of one way to make the loss."""

    def tracked(outputs, labels, num_items_in_batch=None):
        return hycam.track_loss(model, mean_over_step(outputs, labels, num_items_in_batch))

    return {
        "the model's": (Trainer, {}),
        "label smoothing": (Trainer, {"label_smoothing_factor": 0.1}),
        "compute_loss_func": (Trainer, {"compute_loss_func": mean_over_step}),
        "compute_loss_func, tracked": (Trainer, {"compute_loss_func": tracked}),
        "compute_loss": (OwnLoss, {}),
        "compute_loss beside the model's": (OwnLossBesideTheModels, {}),
    }[name]


PATHS = [
    "the model's",
    "label smoothing",
    "compute_loss_func",
    "compute_loss_func, tracked",
    "compute_loss",
    "compute_loss beside the model's",
]


@pytest.mark.filterwarnings("error:the model returns no loss", "error:the backward pass doesn't come")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(2, marks=pytest.mark.slow),
        4,
        pytest.param(8, marks=pytest.mark.slow),
    ],
)
def test_trainer(tmp_path, path, steps):
    model, data = new_adapter(tiny_model()), rows()
    trainer_class, options = loss_path(path, model)
    probe = train(trainer_class, model, data, tmp_path, steps, **options)
    assert len(probe.micro_batches) == steps
    assert probe.error(shares(data, steps, targets)) < TOLERANCE


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(tmp_path, use_reentrant):
    model, data = new_adapter(tiny_model()), rows()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    probe = train(Trainer, model, data, tmp_path, 4, label_smoothing_factor=0.1)
    assert probe.error(shares(data, 4, targets)) < TOLERANCE


@pytest.mark.parametrize(
    ("trainer_class", "is_scaled", "weight"),
    [(MicroBatchMean, False, 0.25), (OwnMicroBatchMean, False, 0.25), (MicroBatchMean, None, 1.0)],
)
def test_a_mean_over_the_micro_batch(tmp_path, monkeypatch, trainer_class, is_scaled, weight):
    """The trainer divides it by the micro-batches where it is told so, and by nothing where it isn't."""
    monkeypatch.setattr(trainer_class, "loss_is_scaled_for_ga", is_scaled, raising=False)
    if is_scaled is False and not hasattr(Trainer, "loss_is_scaled_for_ga"):
        monkeypatch.setattr(trainer_class, "model_accepts_loss_kwargs", False, raising=False)
    probe = train(trainer_class, new_adapter(tiny_model()), rows(), tmp_path, 4)
    assert probe.error([weight] * 4) < TOLERANCE


def test_a_last_step_of_fewer_micro_batches(tmp_path):
    model, data = new_adapter(tiny_model()), rows(6)
    probe = Probe(model)
    arguments = settings(tmp_path, 4, per_device_train_batch_size=2, max_steps=-1, num_train_epochs=1)
    Trainer(model, arguments, train_dataset=data, callbacks=[probe], compute_loss_func=mean_over_step).train()
    assert probe.error(shares(data, 3, targets)) < TOLERANCE


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["rows", "tokens"])
def test_labels_that_are_not_shifted(tmp_path, kind, smoothing):
    """Micro-batches of one row too: its label is the first one, which a shift would leave out."""
    model_class = LlamaForSequenceClassification if kind == "rows" else LlamaForTokenClassification
    model = new_adapter(model_class(tiny_config(num_labels=3)), task_type=None)
    data = rows(4)
    for row in data:
        if kind == "rows":
            row["labels"] = row["input_ids"][0] % 3
        else:
            row["labels"] = torch.where(row["labels"] == -100, -100, row["labels"] % 3)
    probe = train(Trainer, model, data, tmp_path, 4, label_smoothing_factor=smoothing)
    assert probe.error(shares(data, 4, lambda row: int((row["labels"] != -100).sum()))) < TOLERANCE


def test_labels_that_are_shifted_already():
    model, data = new_adapter(tiny_model()), rows(4)
    probe, total = Probe(model), sum(map(targets, data))
    for row in data:
        inputs = {name: value[None] for name, value in row.items()}
        inputs["shift_labels"] = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        model(**inputs, num_items_in_batch=total).loss.backward()
    probe.gradient = router_gradient(model)
    assert probe.error(shares(data, 4, targets)) < TOLERANCE


@pytest.mark.parametrize(
    ("scope", "path", "layers"),
    [
        ("layer", "label smoothing", 1),
        *(
            pytest.param(scope, path, 2, marks=pytest.mark.slow)
            for scope in ("layer", "model")
            for path in ("the model's", "label smoothing", "compute_loss", "compute_loss beside the model's")
        ),
    ],
)
def test_a_compiled_model(tmp_path, scope, path, layers):
    torch._dynamo.reset()
    counters.clear()
    model, data = new_adapter(tiny_model(num_hidden_layers=layers), balance_scope=scope), rows()
    trainer_class, options = loss_path(path, model)
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    probe = train(trainer_class, model, data, tmp_path, 4, arguments=compiled, **options)
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]
    assert probe.error(shares(data, 4, targets)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_layers_compiled_one_by_one(tmp_path, scope):
    torch._dynamo.reset()
    model, data = new_adapter(tiny_model(), balance_scope=scope), rows()
    probe = Probe(model)
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="aot_eager")
    arguments = settings(tmp_path, 4, per_device_train_batch_size=2, label_smoothing_factor=0.1)
    Trainer(model, arguments, train_dataset=data, callbacks=[probe]).train()
    assert probe.error(shares(data, 4, targets)) < TOLERANCE


@pytest.mark.parametrize("scaler", ["torch", "deepspeed"])
def test_float16s_scaler(tmp_path, scaler):
    """What float16's scaler multiplies the loss by, the balance loss is multiplied by.

    DeepSpeed has no float16 on this CPU: a stand-in for its engine says the scale, without scaling the task's loss.
    """
    model, data = new_adapter(tiny_model()), rows()

    class Scaler(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if scaler == "torch":
                trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            else:
                engine = SimpleNamespace(fp16_enabled=lambda: True, optimizer=SimpleNamespace(loss_scale=8.0))
                trainer.accelerator.deepspeed_engine_wrapped = SimpleNamespace(engine=engine)

    probe = Probe(model)
    trainer = Trainer(
        model,
        settings(tmp_path, 4, per_device_train_batch_size=2, label_smoothing_factor=0.1),
        train_dataset=data,
        callbacks=[Scaler(), probe],
    )
    trainer.train()
    assert probe.error([8.0 * share for share in shares(data, 4, targets)]) < TOLERANCE


def loop(loss_of, data, **settings):
    """A plain loop over micro-batches of two rows; `loss_of(model, inputs)` is what goes backward."""
    model = new_adapter(tiny_model(), **settings)
    probe = Probe(model)
    for start in range(0, len(data), 2):
        inputs = {name: torch.stack([row[name] for row in data[start : start + 2]]) for name in data[0]}
        loss_of(model, inputs).backward()
    probe.gradient = router_gradient(model)
    return probe


def test_a_loop_that_divides_by_the_steps_targets():
    data = rows()
    total = sum(map(targets, data))

    def loss_of(model, inputs):
        labels = inputs.pop("labels")
        loss = mean_over_step(model(**inputs), labels, total)
        return hycam.track_loss(model, loss, share=(labels[:, 1:] != -100).sum() / total)

    with pytest.warns(UserWarning, match=r"loss = hycam.track_loss\(model, loss\)"):
        probe = loop(loss_of, data)
    assert probe.error(shares(data, 4, targets)) < TOLERANCE


def test_a_training_step_as_lightning_has_it():
    """Its `training_step` returns the model's loss, which the caller divides by the accumulation steps."""

    class Module(torch.nn.Module):
        def training_step(self, model, inputs):
            return model(**inputs).loss

    def loss_of(model, inputs):
        return Module().training_step(model, inputs) / 4

    assert loop(loss_of, rows()).error([0.25] * 4) < TOLERANCE


@pytest.mark.filterwarnings("ignore:the model returns no loss")
def test_track_loss_follows_the_last_forward_with_gradients():
    def loss_of(model, inputs):
        labels = inputs.pop("labels")
        loss = mean_over_step(model(**inputs), labels, 10)
        with torch.no_grad():
            model(**inputs)  # of a reference
        return hycam.track_loss(model, loss) / 2

    assert loop(loss_of, rows(2)).error([0.5]) < TOLERANCE


@pytest.mark.parametrize("share", [1.5, -0.1, "half", True, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share):
    model = new_adapter(tiny_model())
    loss = model(**{name: value[None] for name, value in rows(1)[0].items()}).loss
    with pytest.raises(ValueError, match="share: got"):
        hycam.track_loss(model, loss, share=share)
