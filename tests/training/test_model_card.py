"""The model card of a run: read by the hub's own reader, its numbers those of the record."""

import json
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from hycam.adapter.model_card import begin
from hycam.training.method import MethodConfig, MethodName
from hycam.training.run import train
from tests.training.runs import run_recipe

_ONE_STEP = {"max_steps": 1, "eval_steps": 1, "save_steps": 1, "warmup_steps": 0, "learning_rate": 0.1}


def _trained(folder: Path, backbone: Path, method: MethodConfig | None = None) -> tuple[dict, Path]:
    """The run's record, and the card of what it trained."""
    evaluation = {"generation": True, "max_new_tokens": 2, "max_generation_rows": 1}
    recipe = run_recipe(folder, backbone, trainer=_ONE_STEP, evaluation=evaluation)
    recipe.method = method or recipe.method
    train(recipe)
    name = "model" if recipe.method.name == "full" else "adapter"
    return json.loads((recipe.output_path / "results.json").read_text()), recipe.output_path / name / "README.md"


def test_the_card_has_the_runs_numbers(tmp_path: Path, backbone: Path) -> None:
    results, path = _trained(tmp_path, backbone)
    card = ModelCard.load(path)
    assert card.data.base_model is None, "the hub refuses a card whose base model is a folder"
    assert not any(tag.startswith("base_model:") for tag in card.data.tags)
    assert f"- base model: `{backbone}`" in card.text
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert card.data.license == "unknown" and card.data.datasets is None
    assert ModelCardData(**card.data.to_dict()).to_dict() == card.data.to_dict()
    measured = {(result.dataset_name, result.metric_name): result for result in card.data.eval_results}
    adapted = results["test"]["adapted"]
    assert set(measured) == {(task, name) for task in adapted["tasks"] for name in ("perplexity", "BLEU-4", "ROUGE-L")}
    for task, values in adapted["tasks"].items():
        result = measured[task, "perplexity"]
        assert isinstance(result, EvalResult) and result.dataset_type == f"{task}.jsonl"
        assert result.metric_value == pytest.approx(values["perplexity"], abs=1e-4)
        base = results["test"]["base"]["tasks"][task]["perplexity"]
        assert f"{base:.4g}" != f"{values['perplexity']:.4g}"
        assert f"| {task} | {base:.4g} | {values['perplexity']:.4g} |" in card.text
    assert "[More Information Needed]" not in card.text
    assert f"{results['parameters']['trainable']:,} of {results['parameters']['total']:,} parameters" in card.text
    assert f"- task `colours`: colours.jsonl, {results['rows']['train']['colours']} rows" in card.text
    headings = [line.removeprefix("## ") for line in card.text.splitlines() if line.startswith("## ")]
    assert headings == [
        "Loading this HyCAM adapter",
        "Evaluating this HyCAM adapter",
        "License",
        "Training",
        "Results on the test split",
    ]
    assert f"--model_args pretrained={backbone},peft=path/to/this/adapter" in card.text


@pytest.mark.parametrize(
    ("base", "kept"), [("owner/model", True), ("gpt2", True), ("/models/model", False), ("models/mine/model", False)]
)
def test_a_base_model_of_the_hub_stays_in_the_head(base: str, kept: bool) -> None:
    tags = ["lora", f"base_model:adapter:{base}"]
    head = ModelCardData(base_model=base, tags=tags).to_yaml()
    card = ModelCard(f"---\n{head}\n---\n")
    begin(card, "title")
    assert card.data.base_model == (base if kept else None)
    assert card.data.tags == (tags if kept else ["lora"])


def test_what_people_wrote_stays_when_a_run_is_measured_again(tmp_path: Path, backbone: Path) -> None:
    _, path = _trained(tmp_path, backbone)
    before = path.read_text()
    path.write_text(before.replace("license: unknown", "license: mit") + "\n## Ours\n\nWritten by hand.\n")
    recipe = run_recipe(tmp_path, backbone, trainer=_ONE_STEP)
    train(recipe, resume=True)
    card = ModelCard.load(path)
    assert card.data.license == "mit"
    assert card.text.rstrip().endswith("## Ours\n\nWritten by hand.")
    assert card.text.count("## Results on the test split") == card.text.count("## Training\n") == 1
    assert "BLEU-4" not in card.text.partition("## Results")[2], "it was measured without generation this time"


@pytest.mark.parametrize(("name", "loader"), [("lora", AutoPeftModelForCausalLM), ("full", AutoModelForCausalLM)])
def test_what_needs_no_import_says_how_it_is_loaded(
    tmp_path: Path, backbone: Path, name: MethodName, loader: type
) -> None:
    _, path = _trained(tmp_path, backbone, MethodConfig(name))
    card = ModelCard.load(path)
    assert "[More Information Needed]" not in card.text and "import hycam" not in card.text
    assert card.data.library_name == ("peft" if name == "lora" else "transformers")
    code = card.text.partition("```python\n")[2].partition("```")[0]
    scope: dict = {}
    exec(code.replace('"path/to/this/folder"', repr(str(path.parent))), scope)
    assert scope["model"].num_parameters() > 0
    assert loader.__name__ in code
