"""Every message that the page quotes is brought about here, from what the page says is its cause."""

import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, MambaConfig

from hycam import HyCAMAttention, HyCAMConfig
from hycam.training.run import train
from hycam_cli import main
from tests.models import tiny_model
from tests.training.runs import recipe_values, rows, run_recipe, save_backbone, save_recipe, save_rows, save_tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
IDS = torch.arange(5, 13)[None]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbone"))


def adapted(family: str = "llama", **settings):
    return get_peft_model(tiny_model(family), HyCAMConfig(r=4, num_experts=2, **settings)).train()


def quoted() -> list[str]:
    """The messages in the first column of the page's tables."""
    cells = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return [message for cell in cells for message in re.findall(r"`(.+?)`", cell)]


def load_without_hycam(folder: Path) -> None:
    adapted().save_pretrained(folder / "adapter")
    tiny_model().save_pretrained(folder / "backbone")
    code = (
        "from peft import PeftModel; from transformers import AutoModelForCausalLM as Auto; "
        "PeftModel.from_pretrained(Auto.from_pretrained('backbone'), 'adapter')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    raise RuntimeError(done.stderr.splitlines()[-1])


def without_attention(folder: Path) -> None:
    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1))
    get_peft_model(model, HyCAMConfig(r=4, num_experts=2))


def loss_from_logits(folder: Path) -> None:
    adapted()(input_ids=IDS).logits.logsumexp(-1).mean().backward()


def another_loss(folder: Path) -> None:
    adapted()(input_ids=IDS, labels=IDS).logits.logsumexp(-1).mean().backward()


def wrapped_by_hand(folder: Path) -> None:
    model = tiny_model().train()
    for layer in model.model.layers:
        layer.self_attn = HyCAMAttention(layer.self_attn, HyCAMConfig(r=4, num_experts=2), hidden_size=32)
    model(input_ids=IDS, labels=IDS).loss.backward()


def replaced_norm(folder: Path) -> None:
    model = adapted(fuse_norm=True)
    norm = model.base_model.model.model.layers[0].input_layernorm
    norm.forward = type(norm).forward.__get__(norm)
    model(input_ids=IDS, labels=IDS)


def second_order(folder: Path) -> None:
    model = adapted()
    weights = [weight for name, weight in model.named_parameters() if "lora_b" in name]
    loss = model(input_ids=IDS, labels=IDS).loss
    sum(gradient.sum() for gradient in torch.autograd.grad(loss, weights, create_graph=True)).backward()


SCRIPTS: dict[str, Callable[[Path], object]] = {
    "KeyError: 'HYCAM'": load_without_hycam,
    "format_version: got 2, which a later version wrote": lambda folder: HyCAMConfig(format_version=2),
    "target_modules: got none for": without_attention,
    "modulation: got 'residual' for model_type": lambda folder: adapted("gemma2", modulation="residual"),
    "the model returns no loss whose scale the balance loss could follow": loss_from_logits,
    "the backward pass doesn't come from the model's own loss": another_loss,
    "HyCAM layers run without hycam.bind(model)": wrapped_by_hand,
    "the norm before the attention did not make its projections": replaced_norm,
    "HyCAM can't be merged into a backbone": lambda folder: adapted().merge_and_unload(),
    "want one for each row": lambda folder: adapted().eval()(IDS, adapter_names=["default"] * 9),
    "second-order gradients are not supported": second_order,
    "backend='triton' can't run this call": lambda folder: adapted(backend="triton")(IDS),
}

FEW = {"tasks": [{"name": "few", "source": "few.jsonl"}]}
OTHER_COLUMNS = {"tasks": [{"name": "other", "source": "other.jsonl"}]}
RECIPES = {
    "unknown field; did you mean": {"trainer": {"lerning_rate": 1}},
    "data.max_length: 129 given, the backbone has 128 positions": {"data": {"max_length": 129}},
    "input: missing, the row has": OTHER_COLUMNS,
    "part, wanted more rows": FEW,
    "has a prompt that leaves room for a response": {"data": {"max_length": 8}},
    "can't be loaded: We couldn't connect": {"backbone": {"name_or_path": "nobody/nothing"}},
    "trainer.report_to: got 'wandb', wanted one of those installed": {"trainer": {"report_to": "wandb"}},
    "needs a launcher, for one process too": {"trainer": {"fsdp": True}},
}

RUNS = {
    "neither a recipe file nor one that ships",
    "no pad token, wanted one",
    "no chat template, wanted one for prompt: chat",
    "were cut to data.max_length=",
    "holds a run: --resume goes on with it, --overwrite deletes it",
    "began with other values of",
    "the gradient is not finite at step",
    "the loss is nan at step",
}


def test_the_page_quotes_what_is_tried_here():
    assert sorted(quoted()) == sorted([*SCRIPTS, *RECIPES, *RUNS])


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("message", SCRIPTS)
def test_in_a_script(message, tmp_path, recwarn):
    try:
        SCRIPTS[message](tmp_path)
        said = [str(warning.message) for warning in recwarn]
    except Exception as error:
        said = [str(error)]
    assert any(message in text for text in said), said


@pytest.mark.parametrize("message", RECIPES)
def test_in_a_recipe(message, tmp_path, backbone, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    save_rows(Path("few.jsonl"), rows(3))
    save_rows(Path("other.jsonl"), [{"question": "a", "answer": "b"}] * 9)
    recipe = save_recipe(tmp_path, recipe_values(tmp_path, backbone, **RECIPES[message]))
    assert main(["train", str(recipe)]) == 2
    assert message in capsys.readouterr().err


def test_a_bare_name(capsys):
    assert main(["train", "my-recipe"]) == 2
    assert "neither a recipe file nor one that ships" in capsys.readouterr().err


def test_a_tokenizer_without_pad_token_or_chat_template(tmp_path, backbone):
    folder = shutil.copytree(backbone, tmp_path / "backbone")
    save_tokenizer(folder, eos_token="<eos>")
    with pytest.raises(ValueError, match="no pad token, wanted one"):
        train(run_recipe(tmp_path / "a", folder))
    tokenizer = save_tokenizer(folder)
    tokenizer.chat_template = None
    for file in folder.glob("chat_template*"):
        file.unlink()
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="no chat template, wanted one for prompt: chat"):
        train(run_recipe(tmp_path / "b", folder))


def test_a_folder_with_a_run(tmp_path, backbone, caplog):
    steps = {"trainer": {"max_steps": 4}}
    with caplog.at_level(logging.WARNING):
        train(run_recipe(tmp_path, backbone, data={"max_length": 31}, **steps))
    assert "were cut to data.max_length=31" in caplog.text
    with pytest.raises(ValueError, match="holds a run: --resume goes on with it, --overwrite deletes it"):
        train(run_recipe(tmp_path, backbone, data={"max_length": 31}, **steps))
    with pytest.raises(ValueError, match=r"began with other values of: data\.max_length"):
        train(run_recipe(tmp_path, backbone, **steps), resume=True)


@pytest.mark.parametrize("message", ["the gradient is not finite at step", "the loss is nan at step"])
def test_a_learning_rate_that_is_too_high(message, tmp_path, backbone):
    with pytest.raises(RuntimeError, match=message):
        train(run_recipe(tmp_path, backbone, trainer={"learning_rate": 1e30 if "gradient" in message else 3e38}))
