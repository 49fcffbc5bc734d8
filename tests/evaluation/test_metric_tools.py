"""What papers' tools make of the answers that we measure: where they agree with us, and by how much they don't."""

import json

import pytest
from sacrebleu.metrics import BLEU

from benchmarks.harness.pages import fill
from hycam.evaluation.generation import evaluate_generation
from tests.evaluation.metric_tools import (
    EMPTY,
    LONG,
    PAGE,
    TOOLS,
    nltk_bleu,
    nmt_bleu,
    rouge_l,
    sacre_bleu,
    table,
    thirteen_a,
)


def test_the_docs_say_what_is_measured():
    page = PAGE.read_text(encoding="utf-8")
    assert page == fill(page, table), "draw the table again: python -m tests.evaluation.metric_tools"


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_a_tool_that_may_be_set_beside_ours_agrees(tool):
    """And one that may not is off by more than what is taken for a gain."""
    differences = {name: abs(value) for name, value in tool.differences().items()}
    largest = max(differences.values())
    if tool.verdict == "yes":
        assert largest < 1e-9
    elif tool.verdict == "no":
        assert largest > 1
    else:
        assert differences["long answers"] < 1e-9
        assert largest > 0.4 or tool.name == "`rougeLsum`"


def test_the_nmt_tutorials_bleu_is_sacrebleus_but_for_several_references():
    """It takes the shortest reference's length, others the one nearest to the answer's."""
    answers = ["the cat sat on the mat today", "a dog ran in the park"]
    several = [
        ["the cat sat on the mat this very day", "the cat sat"],
        ["a dog ran in a park", "that dog ran in the park"],
    ]
    assert nmt_bleu(answers, [[first] for first, _ in several]) == pytest.approx(
        sacre_bleu(answers, [[first] for first, _ in several], smooth_method="none")
    )
    assert nltk_bleu(answers, several, thirteen_a) == pytest.approx(sacre_bleu(answers, several, smooth_method="none"))
    assert nmt_bleu(answers, several) > sacre_bleu(answers, several, smooth_method="none") + 1
    first = evaluate_generation(answers, [of_answer[0] for of_answer in several])["bleu4"]
    assert sacre_bleu(answers, several, smooth_method="none") > first + 1, "ours knows one reference of each answer"


def test_an_empty_answer_counts():
    """Its length in the brevity penalty and its row in the mean; the tutorial's BLEU fails where all are empty."""
    whole, partial = (evaluate_generation(*map(list, zip(*pairs, strict=True))) for pairs in (LONG, EMPTY))
    assert partial["bleu4"] < whole["bleu4"] and partial["rougeL"] < whole["rougeL"]
    assert evaluate_generation(["", ""], ["yes", "no"]) == {"bleu4": 0.0, "rougeL": 0.0}
    assert evaluate_generation(["yes"], [""]) == {"bleu4": 0.0, "rougeL": 0.0}
    assert sacre_bleu(["", ""], [["yes"], ["no"]]) == nltk_bleu(["", ""], [["yes"], ["no"]], thirteen_a) == 0.0
    assert rouge_l(["", ""], ["yes", "no"]) == 0.0


def test_short_answers_have_no_four_tokens():
    """So sacrebleu's corpus BLEU is 0 where they are right; its effective order, for sentences, is another measure."""
    right = ["Paris", "Yes.", "Ada Lovelace"]
    scores = evaluate_generation(right, right)
    assert scores == {"bleu4": 0.0, "rougeL": pytest.approx(100.0)}
    assert sacre_bleu(right, [[text] for text in right]) == scores["bleu4"]
    assert BLEU(effective_order=True).corpus_score(right, [right]).score == pytest.approx(100.0)


def test_what_moses_makes_of_the_answers_is_kept_for_each():
    values = json.loads((PAGE.parents[1] / "tests" / "evaluation" / "answers.json").read_text(encoding="utf-8"))
    texts = {text for kind in ("long", "short") for pair in values[kind] for text in pair.values()}
    assert set(values["moses"]) == texts | {""}
    assert all("".join(tokens.split()) == "".join(text.split()) for text, tokens in values["moses"].items())
