"""Perplexity of the response tokens, per task and over all tasks' tokens."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from hycam.errors import InputError
from hycam.evaluation.batches import Collate, device_of, evaluation_mode, iterate_batches, place_in_group, unwrap
from hycam.evaluation.targets import TargetLogits, at_inputs, find_targets, target_nll


def evaluate_perplexity(
    model: nn.Module,
    tasks: Mapping[str, Dataset],
    collator: Collate,
    *,
    batch_size: int = 8,
    progress: Callable[[int], object] | None = None,
    distributed: bool = False,
) -> dict[str, Any]:
    """exp(total negative log-likelihood / number of response tokens), per task and over all tasks' tokens.

    Each response token counts once and equally, whatever the batches are; sums are float64.

    Args:
        model: a causal language model: a backbone, a PEFT model, or either inside DistributedDataParallel.
        tasks: tokenized rows per task: `input_ids`, `labels` with -100 where a token is no target.
        collator: turns rows into model inputs, padded (`attention_mask`) or packed (`position_ids`).
        batch_size: rows in a forward pass.
        progress: called with the number of rows done after each batch.
        distributed: every process of the default group calls this with the same rows; they part the batches between
            them, and each returns the whole result. Else the calling process evaluates every row by itself.

    Returns:
        `{"tasks": {name: {"nll", "tokens", "perplexity"}}, "overall": {...}}`; `nll` is the sum, in nats. `overall` has
        `row_average` too: the mean of the tasks' perplexities weighted by their rows, in which a task with long
        responses counts for no more than its rows.

    Raises:
        InputError: no task, or a task without a response token.
    """
    if not tasks:
        raise InputError("tasks: none given, at least one is wanted")
    bare = unwrap(model)
    device = device_of(bare)
    rank, processes = place_in_group() if distributed else (0, 1)
    sums: dict[str, tuple[float, int]] = {}
    with evaluation_mode(bare), TargetLogits(bare) as target_logits:
        for name, dataset in tasks.items():
            total = torch.zeros(2, dtype=torch.float64, device=device)
            for rows, batch in iterate_batches(dataset, collator, batch_size, bare, rank=rank, processes=processes):
                labels = batch.pop("labels")
                targets = find_targets(labels, batch.get("position_ids"))
                with target_logits.at(targets.positions, labels.shape):
                    # With a cache, transformers would not read the packed sequences off position_ids.
                    logits = bare(**batch, use_cache=False).logits
                if target_logits.is_possible:
                    logits = logits[0]
                else:
                    logits = at_inputs(logits, labels.shape)[targets.positions.to(logits.device)]
                nll = target_nll(logits, targets.ids.to(logits.device))
                total[0] += nll.sum(dtype=torch.float64).to(device)
                total[1] += nll.numel()
                if progress is not None:
                    progress(rows)
            if processes > 1:
                torch.distributed.all_reduce(total)
            nll_sum, tokens = total.tolist()
            if tokens == 0:
                raise InputError(f"tasks: {name!r} has no response token to score, at least one is wanted")
            sums[name] = (nll_sum, int(tokens))
    overall = (math.fsum(nll for nll, _ in sums.values()), sum(tokens for _, tokens in sums.values()))
    results = {name: _result(*sum_) for name, sum_ in sums.items()}
    weighted = math.fsum(len(tasks[name]) * result["perplexity"] for name, result in results.items())
    average = {"row_average": weighted / sum(map(len, tasks.values()))}
    return {"tasks": results, "overall": _result(*overall) | average}


def _result(nll: float, tokens: int) -> dict[str, float | int]:
    perplexity = torch.tensor(nll / tokens, dtype=torch.float64).exp().item()  # inf where math.exp would overflow
    return {"nll": nll, "tokens": tokens, "perplexity": perplexity}
