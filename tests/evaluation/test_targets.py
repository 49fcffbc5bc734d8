"""Target tokens, and their logits alone: the same numbers as of all tokens."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from hycam.evaluation import targets as targets_module
from hycam.evaluation.perplexity import evaluate_perplexity
from hycam.evaluation.targets import TargetLogits, find_targets, target_nll, uniform_gaps
from hycam.live_bytes import LiveBytes
from tests.adapter.builders import batch
from tests.adapter.outcomes import FOUND, by_type
from tests.adapter.test_decoders import QUICK
from tests.decoders import tiny_decoder
from tests.models import tiny_model

# decoders of encoder-decoder models, whose loss compares a token with itself
UNSHIFTED = ["bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"]
UNSHIFTED += ["trocr", "whisper"]


def prompted(family_batch):
    """Labels after a prompt of another length in each row."""
    labels = family_batch["labels"].clone()
    for row, prompt in enumerate((4, 6, 5)):
        labels[row, :prompt] = -100
    return family_batch | {"labels": labels}


def test_targets_are_predicted_from_the_place_before():
    labels = torch.tensor([[-100, 5, -100, 7], [-100, -100, -100, -100], [9, 8, -100, -100]])
    positions, ids = find_targets(labels)
    assert positions.tolist() == [0, 2, 8] and ids.tolist() == [5, 7, 8]


def test_the_first_token_of_a_packed_sequence_is_no_target():
    positions, ids = find_targets(torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[0, 1, 0, 1, 2]]))
    assert positions.tolist() == [0, 2, 3] and ids.tolist() == [2, 4, 5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_many_targets_are_scored_in_parts(dtype, monkeypatch):
    """Losses and gradients are those of all logits at once, and no more is raised to float32 than a part."""
    monkeypatch.setattr(targets_module, "_LOGITS_AT_ONCE", 70)
    logits, ids = torch.randn(33, 7).to(dtype), torch.randint(0, 7, (33,))
    ids[[0, 12, 32]] = -100
    weights = torch.randn(33).to(torch.promote_types(dtype, torch.float32))
    before = logits.clone()
    outcomes = []
    for score in (target_nll, lambda z, ids: F.cross_entropy(z.to(weights.dtype), ids, reduction="none")):
        z = logits.requires_grad_()
        nll = score(z, ids)
        outcomes.append((nll, *torch.autograd.grad(nll, z, weights)))
    torch.testing.assert_close(*outcomes)
    assert torch.equal(logits, before)


def test_no_more_than_a_part_is_raised_to_float32():
    logits = torch.randn(512, 1 << 14, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.zeros(512, dtype=torch.int64)
    size = logits.nbytes
    with LiveBytes([logits, ids]) as count:
        nll = target_nll(logits, ids).sum()
        part = 4 * targets_module._LOGITS_AT_ONCE
        assert count.live < size / 100
        assert count.peak < 3 * part
        nll.backward()
    assert size < count.peak < 1.1 * size + 3 * part


def test_smoothed_labels_are_those_of_cross_entropy():
    logits, ids = torch.randn(30, 7, dtype=torch.float64), torch.randint(0, 7, (30,))
    plain, smooth = (F.cross_entropy(logits, ids, label_smoothing=smoothing) for smoothing in (0.0, 0.2))
    torch.testing.assert_close(plain + 0.2 * uniform_gaps(logits, ids).mean(), smooth)


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(by_type(FOUND))],
)
def test_every_family_makes_the_logits_of_targets_alone(model_type):
    inputs = prompted(batch())
    labels = inputs.pop("labels")
    targets = find_targets(labels)
    model = tiny_decoder(model_type)
    with torch.no_grad(), TargetLogits(model) as target_logits:
        whole = model(**inputs).logits.flatten(0, 1)[targets.positions]
        with target_logits.at(targets.positions, labels.shape):
            narrow = model(**inputs).logits
        with target_logits.at(F.pad(targets.positions, (0, 1)), labels.shape):
            loss = model(**inputs, labels=F.pad(targets.ids, (1, 0), value=-100)[None]).loss
        again = model(**inputs).logits
    assert narrow.shape == (1, len(targets.ids), whole.shape[-1])
    torch.testing.assert_close(narrow[0], whole)
    assert again.shape[:2] == labels.shape, "only while it lasts"
    if model_type not in UNSHIFTED:
        torch.testing.assert_close(loss, F.cross_entropy(whole, targets.ids))
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs, labels=labels).loss, loss)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradients_are_those_of_all_logits(family):
    model = get_peft_model(tiny_model(family), LoraConfig(init_lora_weights=False))
    inputs = prompted(batch())
    targets = find_targets(inputs["labels"])
    found = []
    with TargetLogits(model) as target_logits:
        model(**inputs).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
        model.zero_grad()
        with target_logits.at(F.pad(targets.positions, (0, 1)), inputs["labels"].shape):
            model(**inputs | {"labels": F.pad(targets.ids, (1, 0), value=-100)[None]}).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert found[0] and all(grad is not None for grad in found[0])
    torch.testing.assert_close(found[1], found[0])


def test_the_model_is_left_as_it_was():
    model = tiny_model()
    head = model.get_output_embeddings()
    ids, outside = torch.tensor([[5, 6]]), torch.tensor([99])
    with pytest.raises(IndexError), TargetLogits(model) as target_logits, target_logits.at(outside, ids.shape):
        model(input_ids=ids)
    assert not head._forward_pre_hooks
    assert target_logits._positions is None


@pytest.mark.parametrize("shows_projection", [True, False])
def test_places_count_from_the_inputs_where_virtual_tokens_precede_them(monkeypatch, shows_projection):
    model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 6]])
    labels = ids.masked_fill(torch.arange(4) < 2, -100)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, -4:-1].flatten(0, 1)
    want = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    if not shows_projection:
        monkeypatch.setattr(model.get_base_model(), "get_output_embeddings", lambda: None)

    def collate(rows):
        return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}

    rows = [{"input_ids": a, "labels": b} for a, b in zip(ids.tolist(), labels.tolist(), strict=True)]
    found = evaluate_perplexity(model, {"task": Dataset.from_list(rows)}, collate)["overall"]
    assert found["nll"] == pytest.approx(want.item(), rel=1e-5) and found["tokens"] == 4


def test_a_model_that_hides_its_projection_makes_all_logits(monkeypatch):
    model = tiny_model()
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}]

    def collate(rows):
        return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}

    tasks = {"task": Dataset.from_list(rows)}
    want = evaluate_perplexity(model, tasks, collate)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert not TargetLogits(model).is_possible
    assert not TargetLogits(nn.Linear(2, 2)).is_possible
    found = evaluate_perplexity(model, tasks, collate)
    assert found["overall"]["nll"] == pytest.approx(want["overall"]["nll"], rel=1e-6)
