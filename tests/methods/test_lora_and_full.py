"""LoRA as a recipe makes it, against weights that are summed by hand; full fine-tuning, against AdamW by hand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hycam.data.collation import Collator
from hycam.training.method import MethodConfig
from hycam.training.prepare import adapted
from hycam.training.recipe import load_recipe
from hycam.training.run import train
from hycam.training.tasks import load_rows, tokenize_split
from tests.adapter.builders import batch
from tests.methods.builders import randomise
from tests.models import tiny_model
from tests.training.runs import recipe_values, save_backbone, save_recipe


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }


@pytest.mark.parametrize(("options", "scale"), [({}, 1.0), ({"r": 4, "lora_alpha": 6}, 1.5)])
def test_lora_is_a_low_rank_sum_in_every_linear_layer(options: dict, scale: float) -> None:
    """y = W x + (alpha / r) B A x: as with summed weights; with s = alpha / r, grad A = s B^T G, grad B = s G A^T."""
    model = adapted(tiny_model(dtype=torch.float64), MethodConfig("lora", options=options))
    randomise(model, scale=0.05)
    dense = tiny_model(dtype=torch.float64)
    layers = linear_layers(dense)
    assert len(layers) == 2 * 7
    factors = {}
    for name, linear in layers.items():
        adapter = model.get_base_model().get_submodule(name)
        factors[name] = a, b = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
        assert a.shape[0] == b.shape[1] == options.get("r", 64)
        with torch.no_grad():
            linear.weight += scale * b @ a
    assert sum(a.numel() + b.numel() for a, b in factors.values()) == model.get_nb_trainable_parameters()[0]
    outputs = [made.eval()(**batch()) for made in (model, dense)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    for name, (a, b) in factors.items():
        grad = layers[name].weight.grad
        torch.testing.assert_close(a.grad, scale * b.detach().T @ grad)
        torch.testing.assert_close(b.grad, scale * grad @ a.detach().T)


def test_lora_starts_as_the_backbone() -> None:
    model = adapted(tiny_model(), MethodConfig("lora"))
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, tiny_model()(**batch()).logits)


def test_full_fine_tuning_steps_every_weight_by_adamw(tmp_path: Path) -> None:
    """A step on all rows at once: p - lr g / (|g| + eps), g the clipped gradient of the responses' mean loss."""
    rate, eps = 1e-3, 1e-8
    backbone = save_backbone(tmp_path / "backbone")
    values = recipe_values(tmp_path, backbone) | {"method": {"name": "full"}}
    values["trainer"] |= {"max_steps": 1, "per_device_train_batch_size": 100, "learning_rate": rate, "warmup_steps": 0}
    values["trainer"] |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    recipe = load_recipe(str(save_recipe(tmp_path, values)))
    train(recipe)
    got = load_file(tmp_path / "run/model/model.safetensors")

    model = AutoModelForCausalLM.from_pretrained(backbone).double()
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    tasks = tokenize_split(load_rows(recipe.tasks, recipe.data), "train", tokenizer, recipe.data)
    rows = [row for dataset in tasks.values() for row in dataset]
    assert 40 < len(rows) <= 100
    inputs = Collator(tokenizer.pad_token_id)(rows)
    labels = inputs.pop("labels")[:, 1:]
    nll = -model(**inputs).logits[:, :-1].log_softmax(-1)
    nll.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100].mean().backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    compared = 0
    for name, parameter in model.named_parameters():
        grad = parameter.grad / max(1.0, norm.item())
        want = parameter.detach() - rate * grad / (grad.abs() + eps)
        clear = grad.abs() > 1e-5  # elsewhere float32's rounding of the gradient turns the step
        compared += int(clear.sum())
        torch.testing.assert_close(got[name].double()[clear], want[clear], rtol=1e-6, atol=1e-5 * rate + 1e-7)
    assert compared > 0.5 * sum(parameter.numel() for parameter in model.parameters())
