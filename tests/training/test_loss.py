"""The loss that a run trains with: of target tokens alone, and the cross-entropy of the next one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hycam.errors import InputError
from hycam.evaluation import targets
from hycam.evaluation.targets import find_targets, target_nll
from hycam.training.callbacks import read_metrics
from hycam.training.loss import causal_lm_loss, check_loss, loss_by_parts
from hycam.training.run import train
from tests.adapter.builders import batch
from tests.decoders import tiny_decoder
from tests.training.runs import run_recipe


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_makes_no_logits_but_the_targets(
    tmp_path: Path, backbone: Path, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the losses are those of all logits, over micro-batches of unequal numbers of targets."""
    trainer = {"max_steps": 3, "logging_steps": 1, "gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1}
    sections: dict[str, Any] = {"trainer": trainer, "data": {"packing": packing}}
    shapes: list[torch.Size] = []

    def note(module: torch.nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, torch.nn.Linear) and module.out_features == 320:  # the vocabulary
            shapes.append(output.shape)

    tokens, losses = [], []
    for is_possible in (True, False):
        folder = tmp_path / str(is_possible)
        folder.mkdir()
        if not is_possible:
            monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda self: None)
        hook = torch.nn.modules.module.register_module_forward_hook(note)
        try:
            train(run_recipe(folder, backbone, **sections), test=False)
        finally:
            hook.remove()
        lines = read_metrics(folder / "run/metrics.jsonl")
        losses.append([line[key] for line in lines for key in ("loss", "eval_loss") if key in line])
        tokens.append(sum(shape[0] * shape[1] for shape in shapes))
        shapes.clear()
    assert 0 < tokens[0] < tokens[1] / 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_layers_below_the_first_adapted_one_have_no_graph(tmp_path: Path, backbone: Path) -> None:
    """Nothing makes a frozen backbone's embeddings ask for a gradient."""
    recipe = run_recipe(tmp_path, backbone, trainer={"max_steps": 1}, method={"layers_to_transform": [1]})
    found: set[tuple[int, bool]] = set()

    def note(module: torch.nn.Module, args: Any, output: Any) -> None:
        # a rehearsal's stand-in is trained whole
        is_frozen = not all(parameter.requires_grad for parameter in module.parameters())
        if isinstance(module, LlamaDecoderLayer) and is_frozen and torch.is_grad_enabled():
            found.add((module.self_attn.layer_idx, output.requires_grad))

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        train(recipe, test=False)
    finally:
        hook.remove()
    assert found == {(0, False), (1, True)}


def own_forward(
    self: LlamaForCausalLM,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    use_cache: bool | None = None,
) -> CausalLMOutputWithPast:
    hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    logits = self.lm_head(hidden)
    loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return CausalLMOutputWithPast(loss=loss, logits=logits)


def test_a_backbone_of_its_own_code(tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shifts its labels itself, and takes no keyword that it doesn't name, as hubs' models do."""
    trainer = {"max_steps": 2, "logging_steps": 1}
    losses = []
    for is_own in (False, True):
        folder = tmp_path / str(is_own)
        folder.mkdir()
        if is_own:
            monkeypatch.setattr(LlamaForCausalLM, "forward", own_forward)
        train(run_recipe(folder, backbone, trainer=trainer), test=False)
        losses.append([line["loss"] for line in read_metrics(folder / "run/metrics.jsonl") if "loss" in line])
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(("model_type", "is_refused"), [("llama", False), ("bart", True)])
def test_another_loss_is_refused(model_type: str, is_refused: bool) -> None:
    """Bart's decoder compares each token with itself."""
    model, inputs = tiny_decoder(model_type), batch()
    targets = find_targets(inputs["labels"])
    num_items = torch.tensor(2 * len(targets.ids))
    with torch.no_grad():
        outputs = model(**inputs, num_items_in_batch=num_items)
    cross_entropy = target_nll(outputs.logits.flatten(0, 1)[targets.positions], targets.ids).sum() / num_items
    if not is_refused:
        check_loss(model, outputs, outputs.loss, cross_entropy)
        return
    with pytest.raises(InputError, match=r"^backbone.name_or_path: BartForCausalLM makes a loss of .*, wanted a model"):
        check_loss(model, outputs, outputs.loss, cross_entropy)


@pytest.mark.parametrize("arguments", [{}, {"num_items_in_batch": 40}, {"num_items_in_batch": torch.tensor(40)}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_by_parts_is_that_of_transformers(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    logits, labels = torch.randn(3, 9, 11, dtype=dtype), torch.randint(0, 11, (3, 9))
    labels[:, :4] = -100
    shifted = F.pad(labels[:, 1:], (0, 1), value=-7)
    for given in ({"labels": labels}, {"labels": None, "shift_labels": shifted, "ignore_index": -7}):
        if given["labels"] is None:
            shifted[shifted == -100] = -7
        outcomes = []
        for loss_function in (causal_lm_loss, ForCausalLMLoss):
            z = logits.clone().requires_grad_()
            loss = loss_function(z, vocab_size=11, **given, **arguments)
            outcomes.append((loss, *torch.autograd.grad(loss, z)))
        torch.testing.assert_close(*outcomes)


def test_a_model_keeps_its_own_loss() -> None:
    """After the training, and in it where it is another one than that of causal language models."""
    model = get_peft_model(tiny_decoder("llama"), LoraConfig(target_modules=["q_proj"]))
    base = model.get_base_model()
    with pytest.raises(ValueError, match="stopped"), loss_by_parts(model):
        assert base.loss_function is causal_lm_loss
        raise ValueError("stopped")
    assert base.loss_function is ForCausalLMLoss

    def own_loss(*args: Any, **kwargs: Any) -> Any:
        return ForCausalLMLoss(*args, **kwargs)

    base.loss_function = own_loss
    with loss_by_parts(model):
        assert base.loss_function is own_loss


def test_a_compiled_model_makes_its_loss_in_one_pass() -> None:
    """And needs no graph for every number of parts."""
    logits, labels = torch.randn(2, 9, 11), torch.randint(0, 11, (2, 9))
    compiled = torch.compile(causal_lm_loss, backend="eager", fullgraph=True)
    assert compiled(logits, labels, 11) == ForCausalLMLoss(logits, labels, 11)
    explanation = torch._dynamo.explain(causal_lm_loss)(logits, labels, 11)
    assert "split" not in str(explanation.graphs[0].code)


def test_training_raises_a_part_of_the_logits_at_a_time(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "_LOGITS_AT_ONCE", 320 * 3)
    parts: list[int] = []
    cross_entropy = F.cross_entropy

    def note(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        parts.append(len(logits))
        return cross_entropy(logits, *args, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", note)
    train(run_recipe(tmp_path, backbone, trainer={"max_steps": 1}), test=False)
    assert max(parts) == 3
