"""Mutual information of expert and task against sums by hand, and at its ends."""

import math

import pytest

from hycam.analysis.routing import mutual_information, routing_specialisation
from hycam.errors import InputError


def test_by_hand():
    """Two tasks of 300 and 100 tokens, two experts: p(e) = (0.65, 0.35)."""
    loads, tokens = {"code": [0.8, 0.2], "text": [0.2, 0.8]}, {"code": 300, "text": 100}
    want = 0.75 * (0.8 * math.log(0.8 / 0.65) + 0.2 * math.log(0.2 / 0.35)) + 0.25 * (
        0.2 * math.log(0.2 / 0.65) + 0.8 * math.log(0.8 / 0.35)
    )
    result = mutual_information(loads, tokens)
    assert result["nats"] == pytest.approx(want, rel=1e-12)
    assert result["nats"] == pytest.approx(0.1470446, abs=1e-6)
    assert result["bits"] == pytest.approx(want / math.log(2), rel=1e-12)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert result["maximum_nats"] == pytest.approx(entropy, rel=1e-12)
    assert result["share"] == pytest.approx(want / entropy, rel=1e-12)


def test_it_is_what_both_entropies_say():
    """I(E; T) = H(E) - H(E | T), by another formula, with three experts of which one is unused by a task."""
    loads = {"a": [0.5, 0.5, 0.0], "b": [0.1, 0.2, 0.7], "c": [0.3, 0.3, 0.4]}
    tokens = {"a": 7, "b": 50, "c": 23}
    shares = {task: count / 80 for task, count in tokens.items()}
    marginal = [sum(shares[task] * load[e] for task, load in loads.items()) for e in range(3)]

    def entropy(weights):
        return -sum(weight * math.log(weight) for weight in weights if weight)

    want = entropy(marginal) - sum(shares[task] * entropy(load) for task, load in loads.items())
    assert mutual_information(loads, tokens)["nats"] == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("tokens", [{"a": 5, "b": 5}, {"a": 1, "b": 999}])
def test_equal_loads_tell_nothing(tokens):
    result = mutual_information({"a": [0.7, 0.2, 0.1], "b": [0.7, 0.2, 0.1]}, tokens)
    assert result["nats"] == pytest.approx(0, abs=1e-15)
    assert result["nats"] >= 0
    assert result["share"] == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("experts", [2, 5])
def test_an_expert_for_each_of_equal_tasks_tells_all(experts):
    loads = {str(task): [float(task == e) for e in range(experts)] for task in range(experts)}
    result = mutual_information(loads, dict.fromkeys(loads, 12))
    assert result["nats"] == pytest.approx(math.log(experts), rel=1e-12)
    assert result["bits"] == pytest.approx(math.log2(experts), rel=1e-12)
    assert result["maximum_nats"] == pytest.approx(math.log(experts), rel=1e-12)
    assert result["share"] == pytest.approx(1, rel=1e-12)


def test_more_tasks_than_experts_reach_the_experts_entropy_at_most():
    loads = {"a": [1, 0], "b": [1, 0], "c": [0, 1], "d": [0, 1]}
    result = mutual_information(loads, dict.fromkeys(loads, 3))
    assert (result["nats"], result["maximum_nats"]) == pytest.approx((math.log(2), math.log(2)))


@pytest.mark.parametrize(
    ("loads", "tokens"), [({"a": [0.2, 0.8]}, {"a": 4}), ({"a": [1.0], "b": [1.0]}, {"a": 4, "b": 5})]
)
def test_one_task_or_one_expert_has_no_maximum(loads, tokens):
    result = mutual_information(loads, tokens)
    assert (result["nats"], result["maximum_nats"], result["share"]) == (0, 0, None)


def test_float32_loads_are_divided_by_their_sum():
    exact = mutual_information({"a": [0.25, 0.75], "b": [0.5, 0.5]}, {"a": 1, "b": 1})
    rounded = mutual_information({"a": [0.2500005, 0.7500015], "b": [0.4999995, 0.4999995]}, {"a": 1, "b": 1})
    assert rounded["nats"] == pytest.approx(exact["nats"], rel=1e-12)


def test_every_layer_and_their_mean():
    loads = {
        "a": {"layers.0": [1.0, 0.0], "layers.1": [0.5, 0.5]},
        "b": {"layers.0": [0.0, 1.0], "layers.1": [0.5, 0.5]},
    }
    result = routing_specialisation(loads, {"a": 10, "b": 10})
    assert [layer["nats"] for layer in result["layers"].values()] == pytest.approx([math.log(2), 0])
    assert result["mean"]["nats"] == pytest.approx(math.log(2) / 2)
    assert result["mean"]["share"] == pytest.approx(0.5)
    single = routing_specialisation({"a": loads["a"]}, {"a": 10})
    assert single["mean"]["share"] is None


@pytest.mark.parametrize(
    ("loads", "tokens", "message"),
    [
        ({}, {}, "loads: no task given"),
        ({"a": [1.0]}, {"b": 1}, r"tokens: \{'b': 1\} given, at least one token of each of \['a'\]"),
        ({"a": [1.0]}, {"a": 0}, r"tokens: \{'a': 0\} given"),
        ({"a": [0.5, 0.4]}, {"a": 1}, r"loads: a: \[0.5, 0.4\] given, 2 weights that add up to 1"),
        ({"a": [0.5, 0.5], "b": [1.0]}, {"a": 1, "b": 1}, r"loads: b: \[1.0\] given, 2 weights"),
        ({"a": [1.5, -0.5]}, {"a": 1}, r"loads: a: \[1.5, -0.5\] given"),
        ({"a": []}, {"a": 1}, r"loads: a: \[\] given"),
    ],
)
def test_wrong_input_is_named(loads, tokens, message):
    with pytest.raises(InputError, match=message):
        mutual_information(loads, tokens)


def test_without_a_layer():
    with pytest.raises(InputError, match="1 tasks and no layer given"):
        routing_specialisation({"a": {}}, {"a": 1})
