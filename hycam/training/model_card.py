"""The model card of what a run trained, from the run's record."""

import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult

from hycam.adapter.model_card import begin, read_card, set_section
from hycam.data.sources import origin
from hycam.evaluation.generation import note_on_bleu
from hycam.training.folder import trained_folder
from hycam.training.recipe import Recipe

_METRICS = {"perplexity": "perplexity", "bleu4": "BLEU-4", "rougeL": "ROUGE-L"}
# As the hub calls them.
_METRIC_TYPES = {"perplexity": "perplexity", "bleu4": "bleu", "rougeL": "rouge"}
# Of what needs no `import hycam`.
_LOADING = {
    "full": "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained({path})",
    "lora": "from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained({path})",
}
_EVALUATING = """\
```bash
hycam eval --adapter path/to/this/folder --task NAME=FILE  # perplexity, BLEU-4 and ROUGE-L of rows in a file
```"""
_LICENSE = """\
Not chosen yet: set `license` in the head of this file. The licences of the base model and of the data say what it may
be."""


def write_run_card(recipe: Recipe, results: Mapping[str, Any]) -> None:
    """Say in the README.md of what the run trained what it was made from and how, and how it measured.

    Args:
        results: what the run's `results.json` holds.
    """
    path = trained_folder(recipe) / "README.md"
    card = read_card(path)
    data: Any = card.data  # its fields are those of ModelCardData
    title = f"{recipe.method.name}, {', '.join(task.name for task in recipe.tasks)}"
    sources = {task.name: origin(task)[1] for task in recipe.tasks}
    data.base_model = results["backbone"]
    data.pipeline_tag = "text-generation"
    data.datasets = sorted({source for source in sources.values() if "/" in source}) or None
    if recipe.method.name == "full":
        data.library_name = "transformers"
    begin(card, title)
    if recipe.method.name in _LOADING:
        code = _LOADING[recipe.method.name].format(path='"path/to/this/folder"')
        set_section(card, "Loading it", f"```python\n{code}\n```", replace=True)
        set_section(card, "Evaluating it", _EVALUATING, replace=True)
    if data.license == "unknown":
        set_section(card, "License", _LICENSE, replace=True)
    set_section(card, "Training", _training(recipe, results, sources), replace=True)
    if "test" in results:
        data.model_name, data.eval_results = title, _eval_results(results["test"]["adapted"], sources)
        set_section(card, "Results on the test split", _table(results["test"]), replace=True)
    card.save(path)


def _training(recipe: Recipe, results: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    parameters, versions = results["parameters"], results["versions"]
    rows = results["rows"].get("train", {})  # a stream's are not counted
    tasks = [
        f"- task `{name}`: {source}" + (f", {rows[name]:,} rows" if name in rows else "")
        for name, source in sources.items()
    ]
    lines = [
        f"- base model: `{results['backbone']}`",
        f"- method: `{recipe.method.name}`, {parameters['trainable']:,} of {parameters['total']:,} parameters trained",
        *tasks,
        f"- {results['steps']:,} steps, seed {recipe.seed}; the whole recipe is in the run's `recipe.yaml`",
        "- " + ", ".join(f"{name} {versions[name]}" for name in ("hycam-kernels", "torch", "transformers", "peft")),
    ]
    return "\n".join(lines)


def _table(test: Mapping[str, Any]) -> str:
    """Metrics per task and overall, of the backbone and as trained."""
    base, adapted = test["base"], test["adapted"]
    metrics = [name for name in _METRICS if name in adapted["overall"]]
    lines = [
        "| task | " + " | ".join(f"{_METRICS[name]}, base | trained" for name in metrics) + " |",
        "| --- |" + " --- | --- |" * len(metrics),
    ]
    for task in [*adapted["tasks"], "overall"]:
        pair = [report["overall"] if task == "overall" else report["tasks"][task] for report in (base, adapted)]
        cells = [f"{report[name]:.4g}" for name in metrics for report in pair]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    note = note_on_bleu((base, adapted))
    return "\n".join(lines if note is None else [*lines, "", note])


def _eval_results(adapted: Mapping[str, Any], sources: Mapping[str, str]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=sources[task],
            dataset_name=task,
            dataset_split="test",
            metric_type=_METRIC_TYPES[name],
            metric_name=label,
            metric_value=round(measured[name], 4),
        )
        for task, measured in adapted["tasks"].items()
        for name, label in _METRICS.items()
        if math.isfinite(measured.get(name, math.nan))
    ]
