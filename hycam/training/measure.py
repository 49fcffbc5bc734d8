"""What `hycam train` at its end and `hycam eval` measure: perplexity, and BLEU-4 and ROUGE-L of greedy responses."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from hycam.data.collation import Collator
from hycam.evaluation.batches import device_of
from hycam.evaluation.generation import evaluate_generation_tasks, generate_responses
from hycam.evaluation.perplexity import evaluate_perplexity
from hycam.training.progress import progress_bar
from hycam.training.recipe import EvaluationConfig, Recipe


@contextmanager
def own_draws(seed: int, device: torch.device) -> Iterator[None]:
    """Random draws that begin at `seed` and leave the process's generators as they were.

    An adapter with `noise="always"` draws in evaluation too: it sees the same noise each time, and training does not
    depend on when it is evaluated.
    """
    accelerator = {} if device.type == "cpu" else {"device_type": device.type}
    with torch.random.fork_rng(devices=[device] if accelerator else [], **accelerator):
        torch.manual_seed(seed)
        yield


def training_precision(recipe: Recipe, device: torch.device) -> torch.autocast:
    """The autocast that `trainer.bf16` or `fp16` trains in: every measurement of its model runs in it too.

    The Trainer puts the model's own call in it, once training begins, but not the call of a backbone or a generation.
    """
    dtype = torch.bfloat16 if recipe.trainer.get("bf16") else torch.float16 if recipe.trainer.get("fp16") else None
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tokenized: Mapping[str, Dataset],
    prompts: Mapping[str, Mapping[str, Any]] | None,
    config: EvaluationConfig,
    *,
    seed: int,
    description: str,
) -> dict[str, Any]:
    """Metrics per task and overall. Of several processes every one calls this.

    Args:
        tokenized: token rows per task, for the perplexity.
        prompts: what `generation_rows` gives, or None for the perplexity alone.
        seed: of the noise that some adapters draw in evaluation.
        description: the progress bar's label.

    Returns:
        `{"tasks": {name: {"nll", "tokens", "perplexity"[, "bleu4", "rougeL", "rows", "too_long"]}}, "overall": {...}}`.
    """
    with own_draws(seed, device_of(model)):
        report = _perplexity(model, tokenizer, tokenized, config, description)
        if prompts is not None:
            _add_generation(report, model, tokenizer, prompts, config, description)
    return report


def _perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tokenized: Mapping[str, Dataset],
    config: EvaluationConfig,
    description: str,
) -> dict[str, Any]:
    assert tokenizer.pad_token_id is not None
    collator = Collator(pad_token_id=tokenizer.pad_token_id)
    total = sum(len(rows) for rows in tokenized.values())
    with progress_bar(total, description, "row", leave=False) as bar:
        return evaluate_perplexity(
            model,
            tokenized,
            collator,
            batch_size=config.batch_size,
            progress=lambda done: bar.update(done),
            distributed=True,
        )


def _add_generation(
    report: dict[str, Any],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Mapping[str, Any]],
    config: EvaluationConfig,
    description: str,
) -> None:
    responses = {}
    with progress_bar(len(prompts), f"{description}: responses", "task", leave=False) as bar:
        for name, chosen in prompts.items():
            responses[name] = generate_responses(
                model,
                tokenizer,
                chosen["prompts"],
                max_new_tokens=config.max_new_tokens,
                batch_size=config.batch_size,
            )
            bar.update()
    references = {name: chosen["references"] for name, chosen in prompts.items()}
    scores = evaluate_generation_tasks(responses, references)
    for name, chosen in prompts.items():
        report["tasks"][name] |= scores["tasks"][name] | {"too_long": chosen["too_long"]}
    report["overall"] |= scores["overall"]


def perplexity_metrics(report: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The Trainer's flat metrics from what `evaluate_perplexity` returns."""
    metrics: dict[str, float] = {}
    for name, result in [("", report["overall"]), *((f"{task}_", r) for task, r in report["tasks"].items())]:
        metrics[f"{prefix}_{name}loss"] = result["nll"] / result["tokens"]
        metrics[f"{prefix}_{name}perplexity"] = result["perplexity"]
    return metrics
