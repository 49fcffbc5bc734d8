"""How far a router's experts specialise in tasks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hycam.errors import InputError

# What rounding leaves of a sum of float32 weights that is 1.
_SUM_TOLERANCE = 1e-3


def mutual_information(loads: Mapping[str, Sequence[float]], tokens: Mapping[str, int]) -> dict[str, float | None]:
    """What the expert that a token goes to tells about the token's task, in one layer.

    With the task's share of all tokens ``p(t) = n_t / sum n``, its load ``p(e | t)`` (a routing weight is read as a
    probability) and ``p(e) = sum_t p(t) p(e | t)``::

        I(E; T) = sum_t p(t) sum_e p(e | t) ln(p(e | t) / p(e))        0 ln 0 = 0

    It is 0 where every task has the same load. It can't exceed ``min(H(T), ln E)`` for E experts, with the tasks'
    entropy ``H(T) = -sum_t p(t) ln p(t)``: that is reached by as many equally large tasks as experts, each with an
    expert of its own, where it is ln E.

    Args:
        loads: task -> mean expert weights [E], which add up to 1; they are divided by their sum.
        tokens: task -> the number of tokens that the means are over.

    Returns:
        `nats`, `bits`, `maximum_nats`, and `share` of the maximum: None where that is 0, with one task or expert.

    Raises:
        InputError: no task, other tasks in `tokens` or none of a task, or loads that are no distributions over the same
            experts.
    """
    _check(loads, tokens)
    total = sum(tokens.values())
    shares = {task: tokens[task] / total for task in loads}
    given_task = {task: [weight / math.fsum(load) for weight in load] for task, load in loads.items()}
    experts = range(len(next(iter(given_task.values()))))
    marginal = [math.fsum(shares[task] * load[e] for task, load in given_task.items()) for e in experts]
    nats = math.fsum(
        shares[task] * load[e] * math.log(load[e] / marginal[e])
        for task, load in given_task.items()
        for e in experts
        if load[e] > 0
    )
    nats = max(nats, 0.0)  # rounding alone takes it below
    entropy = -math.fsum(share * math.log(share) for share in shares.values())
    maximum = max(min(entropy, math.log(len(experts))), 0.0)
    return {
        "nats": nats,
        "bits": nats / math.log(2),
        "maximum_nats": maximum,
        "share": nats / maximum if maximum > 0 else None,
    }


def _check(loads: Mapping[str, Sequence[float]], tokens: Mapping[str, int]) -> None:
    if not loads:
        raise InputError("loads: no task given, at least one is wanted")
    if loads.keys() != tokens.keys() or any(count < 1 for count in tokens.values()):
        raise InputError(f"tokens: {dict(tokens)} given, at least one token of each of {sorted(loads)} is wanted")
    experts = len(next(iter(loads.values())))
    for task, load in loads.items():
        if len(load) != experts or min(load, default=-1) < 0 or abs(math.fsum(load) - 1) > _SUM_TOLERANCE:
            raise InputError(f"loads: {task}: {list(load)} given, {experts} weights that add up to 1 are wanted")


def routing_specialisation(
    loads: Mapping[str, Mapping[str, Sequence[float]]], tokens: Mapping[str, int]
) -> dict[str, Any]:
    """`mutual_information` of every adapted layer, and its mean over the layers.

    Args:
        loads: what `evaluate_expert_load` returns.
        tokens: task -> tokens, as `mutual_information` takes them.

    Returns:
        `{"layers": {module path: {...}}, "mean": {...}}`.

    Raises:
        InputError: no layer, or what `mutual_information` refuses.
    """
    layers = list(next(iter(loads.values()), {}))
    if not layers:
        raise InputError(f"loads: {len(loads)} tasks and no layer given, at least one of both is wanted")
    measured = {
        layer: mutual_information({task: of_layers[layer] for task, of_layers in loads.items()}, tokens)
        for layer in layers
    }
    mean: dict[str, float | None] = {}
    for key in next(iter(measured.values())):
        values = [value for result in measured.values() if (value := result[key]) is not None]
        mean[key] = math.fsum(values) / len(values) if values else None
    return {"layers": measured, "mean": mean}
