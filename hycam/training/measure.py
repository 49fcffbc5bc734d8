"""What `hycam train` at its end and `hycam eval` measure: perplexity, and BLEU-4 and ROUGE-L of greedy responses."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hycam.data import Collator
from hycam.evaluation import evaluate_generation_tasks, evaluate_perplexity, generate_responses
from hycam.training.recipe import EvaluationConfig


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tokenized: Mapping[str, Dataset],
    prompts: Mapping[str, Mapping[str, Any]] | None,
    config: EvaluationConfig,
    *,
    description: str,
) -> dict[str, Any]:
    """Metrics per task and overall.

    Args:
        tokenized: token rows per task, for the perplexity.
        prompts: what `generation_rows` gives, or None for the perplexity alone.
        description: the progress bar's label.

    Returns:
        `{"tasks": {name: {"nll", "tokens", "perplexity"[, "bleu4", "rougeL", "rows", "too_long"]}}, "overall": {...}}`.
    """
    assert tokenizer.pad_token_id is not None
    collator = Collator(pad_token_id=tokenizer.pad_token_id)
    total = sum(len(rows) for rows in tokenized.values())
    with tqdm(total=total, desc=description, unit="row", leave=False) as bar:
        report = evaluate_perplexity(
            model, tokenized, collator, batch_size=config.batch_size, progress=lambda done: bar.update(done)
        )
    if prompts is None:
        return report
    responses = {}
    for name, chosen in tqdm(prompts.items(), desc=f"{description}: responses", unit="task", leave=False):
        responses[name] = generate_responses(
            model,
            tokenizer,
            chosen["prompts"],
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
        )
    references = {name: chosen["references"] for name, chosen in prompts.items()}
    scores = evaluate_generation_tasks(responses, references)
    for name, chosen in prompts.items():
        report["tasks"][name] |= scores["tasks"][name] | {"too_long": chosen["too_long"]}
    report["overall"] |= scores["overall"]
    return report
