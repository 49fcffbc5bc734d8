"""Logits of all tokens beside those of targets: the same losses and gradients, and not the same logits."""

import json

import pytest
import torch
import yaml

from benchmarks.cpu import measure_targets
from benchmarks.harness.record import ROOT
from benchmarks.models import responses
from benchmarks.models.backbones import ModelShape, build
from benchmarks.models.methods import METHODS
from benchmarks.models.responses import ALL, GROUPED, PEERS, TARGETS, batches, check_responses
from benchmarks.models.shapes import CPU_RESPONSES
from benchmarks.models.training import base_model
from benchmarks.op.checks import WrongResultError
from hycam.training.trainer import HyCAMTrainer
from tests.benchmarks.fakes import make_session

# so few tokens and such a vocabulary that logits are most of what a step keeps
SHAPE = ModelShape("tiny-llama", 2, 25, num_experts=2, rank=4, vocabulary=4096)
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["lora", "hycam-torch", "full"])
def test_losses_and_gradients_are_those_of_all_logits(name):
    for dtype in (torch.float32, torch.bfloat16):
        for peer in (TARGETS, GROUPED):
            check_responses(peer, name, SHAPE, dtype, CPU)


class CountsAPromptToken(HyCAMTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        labels = inputs["labels"].clone()
        labels[0, 1] = inputs["input_ids"][0, 1]
        return super().compute_loss(model, inputs | {"labels": labels}, *args, **kwargs)


class LosesHalfTheGradient(HyCAMTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return 0.5 * loss + 0.5 * loss.detach()


@pytest.mark.parametrize(
    ("fault", "message"), [(CountsAPromptToken, "output 0"), (LosesHalfTheGradient, "gradient of .*")]
)
def test_another_loss_is_found(fault, message, monkeypatch):
    monkeypatch.setitem(responses._TRAINERS, TARGETS, fault)
    with pytest.raises(WrongResultError, match=f"lora, {TARGETS}: {message}: relative error .* not timed"):
        check_responses(TARGETS, "lora", SHAPE, torch.bfloat16, CPU)


def test_a_peer_that_makes_all_logits_under_the_other_s_name_is_found(monkeypatch):
    monkeypatch.setitem(responses._TRAINERS, TARGETS, responses._TRAINERS[ALL])
    with pytest.raises(WrongResultError, match=f"lora, {TARGETS}: logits of 50 tokens, wanted [0-9]+: not timed"):
        check_responses(TARGETS, "lora", SHAPE, torch.float32, CPU)


def test_every_method_is_recorded_with_all_three(tmp_path):
    """With the losses of one noise, and less memory by the logits that aren't made and aren't raised to float32."""
    session = make_session(tmp_path / "r.json")
    measure_targets(session, SHAPE, ("lora", "hycam-torch"))
    entries = session.record.entries
    steps = [entry for entry in entries if entry["group"] == "targets"]
    methods = [(method, peer) for method in ("lora", "hycam-torch") for peer in PEERS]
    assert [(entry["setting"], entry["peer"]) for entry in steps] == methods
    for entry in steps:
        assert (entry["beside"], entry["threads"], entry["dtype"]) == (list(PEERS), 1, "bfloat16")
        assert entry["samples_us"] == [1.0, 2.0, 3.0]
    memory = [entry for entry in entries if entry["group"] == "memory"]
    assert [(entry["setting"], entry["peer"]) for entry in memory] == methods
    for entry in memory:
        assert entry["loss"] == pytest.approx(entry["all_logits_loss"], rel=1e-5)
        assert entry["logits"] == (50 if entry["peer"] == ALL else entry["targets"] + 1)
    for every, target, grouped in zip(memory[::3], memory[1::3], memory[2::3], strict=True):
        assert target["resident_bytes"] == every["resident_bytes"] == grouped["resident_bytes"]
        assert target["targets"] == every["targets"]
        assert target["tokens"] == every["tokens"]
        # all logits in float32 beside the targets' in 16 bits
        saved = (4 * every["logits"] - 2 * target["logits"]) * SHAPE.vocabulary
        assert every["kept_bytes"] - target["kept_bytes"] == pytest.approx(saved, rel=0.05)
        assert every["peak_bytes"] - target["peak_bytes"] >= 0.95 * saved


def test_grouped_batches_have_less_padding():
    """The study's, each from the widest to the narrowest."""
    shares, tokens = {}, {}
    for peer in PEERS:
        found = batches(peer, CPU_RESPONSES, CPU)
        widths = [batch["labels"].shape[1] for batch in found]
        assert widths == sorted(widths, reverse=True)
        assert widths[0] == CPU_RESPONSES.length
        tokens[peer] = sum(batch["attention_mask"].sum().item() for batch in found)
        shares[peer] = 1 - tokens[peer] / (CPU_RESPONSES.batch * sum(widths))
        for batch in found:
            assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert shares[ALL] == shares[TARGETS] == pytest.approx(0.185, abs=0.03)
    assert shares[GROUPED] == pytest.approx(0.01, abs=0.01)
    assert tokens[GROUPED] == pytest.approx(tokens[ALL], rel=0.05)


def test_a_wrong_one_leaves_the_other(tmp_path, monkeypatch):
    monkeypatch.setitem(responses._TRAINERS, TARGETS, CountsAPromptToken)
    session = make_session(tmp_path / "r.json")
    measure_targets(session, SHAPE, ("lora",))
    found = {entry["peer"]: entry for entry in session.record.entries if entry["group"] == "targets"}
    wrong = found[TARGETS]
    assert found[ALL]["samples_us"] and found[GROUPED]["samples_us"]
    assert "samples_us" not in wrong
    assert "relative error" in wrong["wrong"]


def test_what_is_saved_on_paper_is_the_shapes():
    model = METHODS["lora"](build(CPU_RESPONSES, torch.bfloat16, torch.device("meta")), CPU_RESPONSES)
    head = base_model(model).get_output_embeddings().weight.numel()
    # the embeddings are the head's weights; a norm's are no product's
    frozen = sum(p.numel() for p in model.parameters() if p.ndim == 2 and not p.requires_grad) - head
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # forward, backward to the activations and, of what is trained, to the weights
    layers = 4 * frozen + 6 * trained
    rates, padding = {}, {}
    for peer in PEERS:
        found = batches(peer, CPU_RESPONSES, CPU)
        tokens, places = (sum(int(count(batch)) for batch in found) for count in (real_tokens, all_places))
        logits = places if peer == ALL else sum(int((batch["labels"] != -100).sum()) + 1 for batch in found)
        rates[peer] = tokens / (places * layers + logits * 4 * head)
        padding[peer] = 1 - tokens / places
    page = (ROOT / "docs" / "performance.md").read_text()
    assert f"on paper {100 * 4 * head / (layers + 4 * head):.0f} % of all products" in page
    assert f"so that {100 * padding[ALL]:.0f} % of their places are padding" in page
    assert f"would be {rates[TARGETS] / rates[ALL]:.2f} and {rates[GROUPED] / rates[ALL]:.2f} times as fast" in page


def real_tokens(batch):
    return batch["attention_mask"].sum()


def all_places(batch):
    return batch["labels"].numel()


def test_rows_are_the_studys():
    recipe = yaml.safe_load((ROOT / "hycam/recipes/studies/study_laptop.yaml").read_text())
    size = recipe["trainer"]["per_device_train_batch_size"], recipe["data"]["max_length"]
    assert (CPU_RESPONSES.batch, CPU_RESPONSES.length) == size
    (record,) = json.loads((ROOT / "docs/study/data/tokens.json").read_text()).values()
    tasks = record["value"]["tasks"].values()
    cut = sum(task["truncated"] for task in tasks) / sum(task["rows"] - task["dropped"] for task in tasks)
    lengths = [tokens for _, tokens in json.loads((ROOT / "benchmarks/models/rows.json").read_text())["rows"]]
    assert max(lengths) == size[1]
    assert lengths.count(size[1]) / len(lengths) == pytest.approx(cut, abs=0.05)
