"""Rotary embeddings whose frequencies follow the longest row of a batch, as transformers computes them.

`longrope` turns every row of a batch by its long factors as soon as one is longer than what the model was first trained
on, and `dynamic` by other frequencies for every length beyond the model's positions. A row's logits are its own only
beside rows of its kind.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from hycam.errors import InputError


class Group(NamedTuple):
    """Rows that may share a batch.

    Attributes:
        rows: places of the rows, the longest first.
        crosses: whether the rows change their frequencies while they grow: what a cache keeps of them is of others.
    """

    rows: list[int]
    crosses: bool


def longrope_switch(config: Any) -> int | None:
    """The most tokens of a row with a longrope model's short factors; None for a model of another kind.

    Args:
        config: the model's transformers configuration, None where it has none.
    """
    return min((rope["original_max_position_embeddings"] for rope in _ropes(config, "longrope")), default=None)


def group_by_frequencies(lengths: Sequence[int], config: Any, *, growth: int = 0) -> Iterator[Group]:
    """Part rows into groups that have the same frequencies each, the longest rows first.

    Args:
        lengths: of the rows, in tokens.
        config: the model's transformers configuration, None where it has none.
        growth: tokens by which each row may grow.

    Raises:
        InputError: a row beyond the positions of a model with dynamic rope, which would keep that row's frequencies
            for those after it.
    """
    longest = max(lengths, default=0) + growth
    if any(_ropes(config, "dynamic")) and longest > config.get_text_config().max_position_embeddings:
        raise InputError(
            f"rows: {longest} tokens in one for a model with dynamic rope, wanted at most its "
            f"{config.get_text_config().max_position_embeddings} positions: beyond, every length has frequencies of "
            "its own"
        )
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    switch = longrope_switch(config)
    if switch is None:
        yield Group(order, False)
        return
    yield Group([row for row in order if lengths[row] > switch], False)
    for row in order:
        if lengths[row] <= switch < lengths[row] + growth:
            yield Group([row], True)
    yield Group([row for row in order if lengths[row] + growth <= switch], False)


def _ropes(config: Any, kind: str) -> list[dict[str, Any]]:
    """A model's rotary parameters of one kind: of the whole model, or of its types of layers."""
    parameters = {} if config is None else getattr(config.get_text_config(), "rope_parameters", None) or {}
    of_layers = [value for value in parameters.values() if isinstance(value, dict)]
    return [rope for rope in [parameters, *of_layers] if rope.get("rope_type") == kind]
