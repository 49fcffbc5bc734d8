"""The loss that a run trains with: of target tokens alone, and the cross-entropy of the next one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hycam.errors import InputError
from hycam.evaluation.targets import find_targets, target_nll
from hycam.training.callbacks import read_metrics
from hycam.training.loss import check_loss
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
