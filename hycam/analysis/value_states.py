"""The attention's value states of tokens of several tasks, in two dimensions (the paper's Fig. 2)."""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from hycam.adapter.discovery import CACHE
from hycam.errors import InputError
from hycam.evaluation.batches import Collate, evaluation_mode, iterate_batches, unwrap

# t-SNE's perplexity where there are tokens enough; a third of the others is the most that it can use.
_PERPLEXITY = 30.0


def token_value_states(
    model: nn.Module,
    tasks: Mapping[str, Dataset],
    collator: Collate,
    *,
    count: int,
    layer: int = -1,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Value states of single tokens, drawn from all tokens of each task's rows: prompt and response, no padding.

    Value states are what the layer's key-value cache holds: the value projection of the attention's input. An adapter
    that leaves that projection alone, as HyCAM does, moves them from the second adapted layer on.

    Args:
        model: a causal language model, adapted or not.
        tasks: token rows per task.
        collator: makes padded model inputs (`attention_mask`).
        count: tokens of a task, at most.
        layer: index of the decoder layer; negative ones count from the last.
        batch_size: rows in a forward pass.
        seed: of the draw, which is the same for every model.

    Returns:
        Task -> [tokens, key-value heads x head size] float32 on the CPU, rows with more tokens first.

    Raises:
        InputError: no task, an empty task, a layer that the model lacks, or one whose cache keeps a window shorter than
            the rows.
    """
    if not tasks or not all(len(rows) for rows in tasks.values()):
        raise InputError(f"tasks: {list(tasks)} given, at least one is wanted, and rows in each")
    bare = unwrap(model)
    states: dict[str, torch.Tensor] = {}
    with evaluation_mode(bare):
        for name, rows in tasks.items():
            chosen = _drawn(sum(map(len, rows["input_ids"])), count, seed)
            found, first = [], 0
            for _, batch in iterate_batches(rows, collator, batch_size, bare):
                batch.pop("labels")
                cache = bare(**batch, use_cache=True)[CACHE]
                layers = len(cache.layers)
                if not -layers <= layer < layers:
                    raise InputError(f"layer: {layer} given, the model has {layers}")
                values = cache.layers[layer].values  # [batch, key-value heads, length, head size]
                mask = batch["attention_mask"].to(values.device).bool()
                if values.shape[2] != mask.shape[1]:
                    raise InputError(
                        f"layer: {layer} given, whose cache keeps {values.shape[2]} of {mask.shape[1]} tokens; one "
                        "that keeps all is wanted"
                    )
                tokens = values.transpose(1, 2)[mask].flatten(1)
                here = chosen[(chosen >= first) & (chosen < first + len(tokens))] - first
                found.append(tokens[here.to(tokens.device)].float().cpu())
                first += len(tokens)
            states[name] = torch.cat(found)
    return states


def _drawn(total: int, count: int, seed: int) -> torch.Tensor:
    """At most `count` different indices below `total`, in order."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def embed_value_states(states: Mapping[str, torch.Tensor], *, seed: int = 0) -> dict[str, Any]:
    """t-SNE of the tokens of all tasks together, and how far the tasks part before it.

    scikit-learn's TSNE: PCA initialisation, perplexity 30, or a third of the other tokens where they are too few. Its
    axes and distances mean nothing beside which tokens are neighbours; the silhouette is of the states themselves.

    Args:
        states: task -> [tokens, features], with two tokens in at least one task.

    Returns:
        `points`: task -> [[x, y], ...]; `perplexity`; `silhouette`: the mean silhouette coefficient (-1 to 1) of the
        tasks by Euclidean distance, None with one task or as many as tokens.

    Raises:
        InputError: without scikit-learn, or with fewer than four tokens.
    """
    try:
        from sklearn.manifold import TSNE
        from sklearn.metrics import silhouette_score
    except ImportError as error:
        raise InputError(
            "t-SNE: scikit-learn is not installed, wanted: pip install 'hycam-kernels[analysis]'"
        ) from error
    rows = torch.cat(list(states.values())).double().numpy()
    if len(rows) < 4:
        raise InputError(f"states: {len(rows)} tokens given, at least 4 are wanted")
    perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows)
    labels = [task for task, values in states.items() for _ in range(len(values))]
    parted = torch.from_numpy(points).split([len(values) for values in states.values()])
    return {
        "points": {task: part.tolist() for task, part in zip(states, parted, strict=True)},
        "perplexity": perplexity,
        "silhouette": float(silhouette_score(rows, labels)) if 1 < len(states) < len(rows) else None,
    }
