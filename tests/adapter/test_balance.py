"""The balance loss's gradient equals the plain loop's, however the model is run."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import hycam
from hycam import HyCAMAttention, HyCAMConfig, router_statistics
from tests.adapter.builders import adapted_model, batch, gradients, largest_error, layers_of, plain_loss, randomise
from tests.models import tiny_model

COEF = 1.0
TOLERANCE = 1e-5


def balanced(scope="layer", family="llama", **settings):
    settings = {"noise": "never", "balance_coef": COEF, "balance_scope": scope} | settings
    return adapted_model(family, **settings)


def plain_gradients(inputs, *, scale=1.0, scope="layer", family="llama", coef=COEF, **settings):
    model = balanced(scope, family, **({"balance_coef": 0.0} | settings))
    torch.manual_seed(5)
    (plain_loss(model, inputs, coef=coef, scope=scope) * scale).backward()
    return gradients(model)


def checkpointed(model, use_reentrant):
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    return model


@pytest.mark.parametrize(
    "preset",
    [
        "paper",
        "released_code",
        *(
            pytest.param(ablation, marks=pytest.mark.slow)
            for ablation in ("shared_only", "full_spec", "spec_only", "inverse_peft")
        ),
    ],
)
def test_a_plain_loop_learns(preset):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), HyCAMConfig.preset(preset, r=4, num_experts=3)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(40):
        losses.append(model(**batch()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_gradient_equals_the_plain_loops(scope, use_reentrant, scale):
    model = checkpointed(balanced(scope), use_reentrant)
    (model(**batch()).loss * scale).backward()
    want = plain_gradients(batch(), scope=scope, scale=scale)
    assert largest_error(gradients(model), want) < TOLERANCE
    without = plain_gradients(batch(), scope=scope, scale=scale, coef=0.0)
    assert largest_error(without, want) > 0.05, "the balance loss is too small for this test to see"


@pytest.mark.parametrize("use_reentrant", [None, True])
@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gpt_neox"])
def test_other_ways_to_call_attention(family, use_reentrant):
    model = checkpointed(balanced(family=family), use_reentrant)
    torch.manual_seed(5)  # GPT-2 drops out
    model(**batch()).loss.backward()
    assert largest_error(gradients(model), plain_gradients(batch(), family=family)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("routing", ["soft", "hard"])
@pytest.mark.parametrize("modulation", ["attention", "residual"])
@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("experts", ["slora", "full"])
@pytest.mark.parametrize("bias", [False, True])
def test_checkpointing_changes_no_gradient(scope, use_reentrant, routing, modulation, experts, bias):
    settings = {"routing": routing, "modulation": modulation, "experts": experts, "bias": bias}
    settings |= {"noise": "train", "train_norms": True}
    wanted = balanced(scope, **settings)
    torch.manual_seed(5)
    wanted(**batch()).loss.backward()
    model = checkpointed(balanced(scope, **settings), use_reentrant)
    torch.manual_seed(5)
    model(**batch()).loss.backward()
    assert largest_error(gradients(model), gradients(wanted)) < TOLERANCE


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"modulation": "residual", "train_norms": True}, {"noise": "always", "bias": True}]
)
def test_checkpointing_replays_noise_and_residual(settings, use_reentrant):
    wanted = balanced(**({"noise": "train"} | settings))
    torch.manual_seed(5)
    wanted(**batch()).loss.backward()
    model = checkpointed(balanced(**({"noise": "train"} | settings)), use_reentrant)
    torch.manual_seed(5)
    model(**batch()).loss.backward()
    want = gradients(wanted)
    assert largest_error(gradients(model), want) < TOLERANCE
    torch.manual_seed(6)
    wanted(**batch()).loss.backward()
    assert largest_error(gradients(wanted), want) > 1e-3, "the noise doesn't depend on the generator"


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_two_forwards_before_one_backward_keep_their_own_masks(use_reentrant):
    first, second = batch(0), batch(1, rows=2, length=7)
    model = checkpointed(balanced(), use_reentrant)
    (model(**first).loss + 3 * model(**second).loss).backward()
    one, two = plain_gradients(first), plain_gradients(second, scale=3.0)
    assert largest_error(gradients(model), {name: one[name] + two[name] for name in one}) < TOLERANCE


def test_padding_does_not_count():
    model = balanced()
    inputs = batch()
    model(**inputs).loss.backward()
    want, statistics = gradients(model), router_statistics(model)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 77)
    model(**inputs).loss.backward()
    assert largest_error(gradients(model), want) < TOLERANCE
    for name, kept in router_statistics(model).items():
        torch.testing.assert_close(kept.load, statistics[name].load)
        assert kept.tokens == inputs["attention_mask"].sum() == 22


def test_padding_does_not_count_beside_a_cache():
    """The mask spans cached and present tokens: the present ones are its last columns."""
    model = balanced(family="llama").eval()
    ids, mask = batch()["input_ids"], torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1]])
    cache = model(input_ids=ids[:, :3], attention_mask=mask[:, :3]).past_key_values
    model(input_ids=ids[:, 3:6], attention_mask=mask, past_key_values=cache)
    assert all(kept.tokens == 8 for kept in router_statistics(model).values())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_statistics_stay_those_of_the_last_forward_when_a_backward_runs_an_earlier_one_again(use_reentrant):
    model = checkpointed(balanced(), use_reentrant)
    loss = model(**batch()).loss
    model(**batch(1, rows=2))
    want = router_statistics(model)
    loss.backward()
    for name, kept in router_statistics(model).items():
        assert kept.tokens == 13
        assert torch.equal(kept.load, want[name].load)


def test_packed_batches_count_every_token():
    model = balanced()
    inputs = batch()
    ids = inputs["input_ids"].view(1, -1)
    positions = torch.arange(9).repeat(3).view(1, -1)
    model(input_ids=ids, position_ids=positions, labels=ids).loss.backward()
    assert all(kept.tokens == 27 for kept in router_statistics(model).values())


def test_token_share_follows_num_items_in_batch():
    """Two micro-batches with 16 and 11 target tokens: each balance loss weighs its share, as each task loss does."""
    micro = [batch(0), batch(1, rows=2, length=8)]
    total = sum((m["labels"][:, 1:] != -100).sum() for m in micro)
    model = balanced()
    want = None
    for inputs in micro:
        model(**inputs, num_items_in_batch=total).loss.backward()
        share = (inputs["labels"][:, 1:] != -100).sum() / total
        part = plain_gradients(inputs, scale=share)
        want = part if want is None else {name: want[name] + part[name] for name in want}
    assert largest_error(gradients(model), want) < TOLERANCE


def test_tuple_output_carries_the_loss():
    model = balanced()
    (model(**batch(), return_dict=False)[0] * 0.5).backward()
    assert largest_error(gradients(model), plain_gradients(batch(), scale=0.5)) < TOLERANCE


def test_loss_outside_the_model():
    model = balanced()
    inputs = batch()
    labels = inputs.pop("labels")
    with pytest.warns(UserWarning, match="track_loss"):
        logits = model(**inputs).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    (hycam.track_loss(model, loss) * 0.5).backward()
    assert largest_error(gradients(model), plain_gradients(batch(), scale=0.5)) < TOLERANCE


def test_a_loss_of_ones_own_beside_the_models_is_told():
    model = balanced()
    inputs = batch()
    logits = model(**inputs).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    with pytest.warns(UserWarning, match="track_loss"):
        loss.backward()


def test_the_loss_may_be_scaled_in_place():
    model = balanced()
    loss = model(**batch()).loss
    loss *= 0.5
    loss.backward()
    assert largest_error(gradients(model), plain_gradients(batch(), scale=0.5)) < TOLERANCE


def test_frozen_router_keeps_its_start_and_still_steers_the_hidden_states():
    model = balanced(train_router=False)
    before = {n: p.clone() for n, p in model.named_parameters() if "hycam_router" in n}
    assert all(not p.requires_grad for n, p in model.named_parameters() if "hycam_router" in n)
    model(**batch()).loss.backward()
    want = plain_gradients(batch(), train_router=False)
    assert largest_error(gradients(model), want) < TOLERANCE
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_mean_is_over_the_adapted_layers():
    model = balanced(layers_to_transform=[1])
    model(**batch()).loss.backward()
    assert largest_error(gradients(model), plain_gradients(batch(), layers_to_transform=[1])) < TOLERANCE


class Gradients(TrainerCallback):
    """Keeps what the optimiser is about to use."""

    def __init__(self):
        self.kept = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.kept.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})


class InOrder(IterableDataset):
    """Rows that no sampler shuffles."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def trainer_gradients(model, tmp_path, accumulation):
    rows = [{name: value[row] for name, value in batch(seed, rows=4).items()} for seed in (0, 1) for row in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(rows) // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=1e9,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    callback = Gradients()
    Trainer(model, arguments, train_dataset=InOrder(rows), callbacks=[callback]).train()
    return rows, callback.kept[0]


@pytest.mark.parametrize("use_reentrant", [None, True])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_hf_trainer(tmp_path, accumulation, use_reentrant):
    model = checkpointed(balanced(), use_reentrant)
    rows, got = trainer_gradients(model, tmp_path, accumulation)
    size = len(rows) // accumulation
    micro = [{n: torch.stack([r[n] for r in rows[i : i + size]]) for n in rows[0]} for i in range(0, len(rows), size)]
    total = sum((m["labels"][:, 1:] != -100).sum() for m in micro)
    want = None
    for inputs in micro:
        part = plain_gradients(inputs, scale=(inputs["labels"][:, 1:] != -100).sum() / total)
        want = part if want is None else {name: want[name] + part[name] for name in want}
    assert largest_error(got, want) < TOLERANCE


def test_accelerate_with_accumulation():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = balanced()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    micro = [batch(0), batch(1)]
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(micro, batch_size=None))
    for inputs in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**inputs).loss)
    parts = [plain_gradients(inputs, scale=0.5) for inputs in micro]
    want = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    assert largest_error(gradients(accelerator.unwrap_model(model)), want) < TOLERANCE


def test_transformers_own_adapter_is_balanced_too():
    peft_model = balanced()
    model = copy.deepcopy(peft_model.get_base_model())
    model(**batch()).loss.backward()
    want = {name.removeprefix("base_model.model."): g for name, g in plain_gradients(batch()).items()}
    assert largest_error(gradients(model), want) < TOLERANCE


def test_ranks_draw_different_noise(monkeypatch):
    model = balanced(noise="always")
    outputs = []
    for rank in (0, 0, 1):
        monkeypatch.setattr(hycam.adapter.calls.ModelCalls, "data_parallel_rank", lambda self, rank=rank: rank)
        torch.manual_seed(0)
        outputs.append(model(**batch()).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


class PlainModel(nn.Module):
    """A model of no library's: two attentions, no keywords passed on, the loss in a wrap of its own."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap
        self.layers = nn.ModuleList(PlainAttention() for _ in range(2))

    def forward(self, hidden, attention_mask, labels):
        for layer in self.layers:
            hidden = hidden + layer(hidden)[0]
        return self.wrap((hidden - labels).square().mean())


class DeafModel(PlainModel):
    """Takes any keyword, and hands none on."""

    def forward(self, hidden, attention_mask, labels, **kwargs):
        return super().forward(hidden, attention_mask, labels)


class PlainAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(16, 16)

    def forward(self, hidden):
        return self.projection(hidden), None


@pytest.mark.parametrize(
    "wrap", [lambda loss: loss, lambda loss: SimpleNamespace(loss=loss), lambda loss: {"loss": loss}]
)
@pytest.mark.parametrize("model_class", [PlainModel, DeafModel])
def test_any_model_by_hand(model_class, wrap):
    torch.manual_seed(0)
    model = model_class(wrap)
    settings = {"r": 4, "num_experts": 3, "noise": "never"}
    for index, layer in enumerate(model.layers):
        model.layers[index] = HyCAMAttention(layer, HyCAMConfig(balance_coef=COEF, **settings), hidden_size=16)
    randomise(model)
    hycam.bind(model)
    other = copy.deepcopy(model)
    hidden, labels = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    output = model(hidden, mask, labels)
    loss = output if isinstance(output, torch.Tensor) else output["loss"] if isinstance(output, dict) else output.loss
    (loss * 0.5).backward()

    for layer in layers_of(other).values():
        layer.adapter_configs["default"] = HyCAMConfig(balance_coef=0.0, **settings)

    other.wrap = lambda loss: SimpleNamespace(loss=loss)
    inputs = {"hidden": hidden, "attention_mask": mask, "labels": labels}
    (plain_loss(other, inputs, coef=COEF) * 0.5).backward()
    assert largest_error(gradients(model), gradients(other)) < TOLERANCE


def test_mask_of_another_shape_is_refused():
    model = balanced()
    inputs = batch()
    with pytest.raises(ValueError, match="attention_mask: got shape"):
        layers_of(model)["base_model.model.model.layers.0.self_attn"](
            hidden_states=torch.randn(3, 12, 32),
            position_embeddings=(torch.ones(3, 12, 8), torch.zeros(3, 12, 8)),
            attention_mask=None,
            hycam_context=hycam.adapter.balance.ForwardContext({}, inputs["attention_mask"]),
        )
