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
from benchmarks.models.responses import ALL, PROMPT_SHARE, TARGETS, check_responses, prompt_tokens
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
        check_responses(TARGETS, name, SHAPE, dtype, CPU)


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
    with pytest.raises(WrongResultError, match=f"lora, {TARGETS}: logits of 50 tokens, wanted 29: not timed"):
        check_responses(TARGETS, "lora", SHAPE, torch.float32, CPU)


def test_every_method_is_recorded_with_both(tmp_path):
    """With the losses of one noise, and less memory by the logits that aren't made."""
    session = make_session(tmp_path / "r.json")
    measure_targets(session, SHAPE, ("lora", "hycam-torch"))
    entries = session.record.entries
    steps = [entry for entry in entries if entry["group"] == "targets"]
    methods = [(method, peer) for method in ("lora", "hycam-torch") for peer in (ALL, TARGETS)]
    assert [(entry["setting"], entry["peer"]) for entry in steps] == methods
    for entry in steps:
        assert (entry["beside"], entry["threads"], entry["dtype"]) == ([ALL, TARGETS], 1, "bfloat16")
        assert entry["samples_us"] == [1.0, 2.0, 3.0]
    memory = [entry for entry in entries if entry["group"] == "memory"]
    assert [(entry["setting"], entry["peer"]) for entry in memory] == methods
    for every, target in zip(memory[::2], memory[1::2], strict=True):
        assert (every["logits"], target["logits"], every["targets"], target["targets"]) == (50, 29, 28, 28)
        assert target["loss"] == pytest.approx(every["loss"], rel=1e-5)
        assert target["resident_bytes"] == every["resident_bytes"]
        # of each token's logits, those in float32 that the loss keeps
        saved = (every["logits"] - target["logits"]) * SHAPE.vocabulary * 4
        assert every["kept_bytes"] - target["kept_bytes"] == pytest.approx(saved, rel=0.05)
        assert every["peak_bytes"] - target["peak_bytes"] >= saved


def test_a_wrong_one_leaves_the_other(tmp_path, monkeypatch):
    monkeypatch.setitem(responses._TRAINERS, TARGETS, CountsAPromptToken)
    session = make_session(tmp_path / "r.json")
    measure_targets(session, SHAPE, ("lora",))
    every, wrong = sorted(
        (entry for entry in session.record.entries if entry["group"] == "targets"), key=lambda entry: entry["peer"]
    )
    assert every["samples_us"]
    assert "samples_us" not in wrong
    assert "relative error" in wrong["wrong"]


def test_what_is_saved_on_paper_is_the_shapes():
    model = METHODS["lora"](build(CPU_RESPONSES, torch.bfloat16, torch.device("meta")), CPU_RESPONSES)
    head = base_model(model).get_output_embeddings().weight.numel()
    # the embeddings are the head's weights; a norm's are no product's
    frozen = sum(p.numel() for p in model.parameters() if p.ndim == 2 and not p.requires_grad) - head
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # forward, backward to the activations and, of what is trained, to the weights
    whole = 4 * (frozen + head) + 6 * trained
    saved = 4 * head * prompt_tokens(CPU_RESPONSES.length) / CPU_RESPONSES.length
    page = (ROOT / "docs" / "performance.md").read_text()
    assert f"on paper {100 * 4 * head / whole:.0f} % of all products" in page
    assert f"without the prompts' {whole / (whole - saved):.2f} times the tokens" in page
    assert f"without any {whole / (whole - 4 * head):.2f} times" in page


def test_rows_are_the_studys():
    recipe = yaml.safe_load((ROOT / "hycam/recipes/studies/study_laptop.yaml").read_text())
    size = recipe["trainer"]["per_device_train_batch_size"], recipe["data"]["max_length"]
    assert (CPU_RESPONSES.batch, CPU_RESPONSES.length) == size
    (record,) = json.loads((ROOT / "docs/study/data/tokens.json").read_text()).values()
    tasks = record["value"]["tasks"].values()
    prompts, answers = (sum(t["rows"] * t[part]["mean"] for t in tasks) for part in ("prompt", "response"))
    assert prompts / (prompts + answers) == pytest.approx(PROMPT_SHARE, abs=0.005)
