import re

import pytest

from hycam.data.synthetic import SYNTHETIC_TASKS, general_text, synthetic_task
from hycam.errors import InputError


@pytest.mark.parametrize("name", SYNTHETIC_TASKS)
def test_rows_are_different_complete_and_repeatable(name):
    rows = synthetic_task(name, 2000, seed=3)
    assert rows.column_names == ["instruction", "input", "output"]
    assert len(rows) == 2000
    prompts = {(row["instruction"], row["input"]) for row in rows}
    assert len(prompts) == 2000, "no prompt twice, so that splits by content share no row"
    assert all(row["instruction"] and row["output"] for row in rows)
    assert synthetic_task(name, 2000, seed=3).to_list() == rows.to_list()
    assert synthetic_task(name, 50, seed=3).to_list() == rows.select(range(50)).to_list()
    assert synthetic_task(name, 50, seed=4).to_list() != rows.select(range(50)).to_list()


def test_families_differ_and_three_have_context():
    rows = {name: synthetic_task(name, 20, seed=0).to_list() for name in SYNTHETIC_TASKS}
    assert len(SYNTHETIC_TASKS) == 5
    with_input = {name for name, family in rows.items() if all(row["input"] for row in family)}
    assert with_input == {"synthetic_context", "synthetic_longform"}


def test_reasoning_adds_up():
    for row in synthetic_task("synthetic_reasoning", 500, seed=0):
        numbers = [int(number) for number in re.findall(r"\d+", row["instruction"])]
        verbs = re.findall(r"\. \w+ (buys|finds|gets|loses|sells|gives away)", row["instruction"])
        count = numbers[0]
        for verb, number in zip(verbs, numbers[1:], strict=True):
            count += number if verb in {"buys", "finds", "gets"} else -number
            assert 1 <= count <= 20
        assert row["output"].endswith(f"The answer is {count}.")
        for a, sign, b, c in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", row["output"]):
            assert int(a) + (int(b) if sign == "+" else -int(b)) == int(c)


def test_code_does_what_it_says():
    for row in synthetic_task("synthetic_code", 500, seed=0):
        scope: dict = {}
        exec(row["output"], scope)
        name, words = re.fullmatch(r"Write a Python function (\w+) that (.*)\.", row["instruction"]).groups()
        number = expected = 37
        for step in words.split(" and "):
            k = int(re.search(r"\d+", step).group())
            verb = step.split()[0]
            expected = {
                "adds": expected + k,
                "subtracts": expected - k,
                "multiplies": expected * k,
                "divides": expected // k,
            }[verb]
        assert scope[name](number) == expected


def test_context_answers_come_from_the_context():
    for row in synthetic_task("synthetic_context", 300, seed=0):
        facts = re.fullmatch(
            r"(\w+) is a town in the (\w+)\. It has (\d+) people\. Its market sells (\w+) on (\w+)\.", row["input"]
        ).groups()
        assert any(fact in row["output"] for fact in facts[1:])


def test_longform_cites_its_evidence():
    for row in synthetic_task("synthetic_longform", 300, seed=0):
        first, second = re.fullmatch(r"\[1\] In \d+, (.*)\. \[2\] In \w+, (.*)\.", row["input"]).groups()
        assert f"First, {first} [1]. Second, {second} [2]." in row["output"]


def test_more_rows_than_there_are_is_an_error(monkeypatch):
    monkeypatch.setattr("hycam.data.synthetic._PEOPLE", ("Mia",))
    monkeypatch.setattr("hycam.data.synthetic._THINGS", ("apples",))
    monkeypatch.setattr("hycam.data.synthetic._steps", lambda rng, start: iter(()))
    assert len(synthetic_task("synthetic_reasoning", 11, seed=0)) == 11
    with pytest.raises(InputError, match="num_rows: 12 given, synthetic_reasoning has only about 11"):
        synthetic_task("synthetic_reasoning", 12, seed=0)


@pytest.mark.parametrize(
    ("name", "num_rows", "message"),
    [("synthetic_poetry", 5, "'synthetic_poetry' given.*synthetic_code"), ("synthetic_code", 0, "num_rows: 0 given")],
)
def test_wrong_input_is_named(name, num_rows, message):
    with pytest.raises(InputError, match=message):
        synthetic_task(name, num_rows, seed=0)


def test_general_text_is_repeatable_and_answers_nothing():
    documents = general_text(3000, seed=1)
    assert documents == general_text(3000, seed=1)
    assert documents[:10] == general_text(10, seed=1)
    assert documents != general_text(3000, seed=2)
    assert len(set(documents)) > 2900, "hardly a document twice"
    text = "\n".join(documents)
    words = set(re.findall(r"[a-z]{4,}", text))
    for name in SYNTHETIC_TASKS:
        rows = synthetic_task(name, 300, seed=0).to_list()
        assert not any(row["output"] in text for row in rows), "answers are for the tasks to teach"
        used = [word for row in rows for word in re.findall(r"[a-z]{4,}", " ".join(row.values()))]
        assert sum(word in words for word in used) > 0.95 * len(used), "the backbone knows a task's words"
    with pytest.raises(InputError, match="num_documents: 0 given"):
        general_text(0, seed=0)
