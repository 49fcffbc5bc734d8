"""The study's statistics against hand-computed numbers and scipy."""

import math
from typing import Any

import pytest
from scipy import stats

from hycam.study.statistics import Summary, against_best_baseline, paired_t_test, scores, summarise

_HYCAM = {(0, 0): 10.0, (0, 1): 11.0, (1, 0): 12.0, (1, 1): 13.0}
_LORA = {(0, 0): 11.0, (0, 1): 13.0, (1, 0): 13.0, (1, 1): 15.0}
_MOELORA = {(0, 0): 14.0, (0, 1): 9.0, (1, 0): 14.0, (1, 1): 16.0}


def _record(**methods: dict[tuple[int, int], float]) -> dict[str, Any]:
    """Cells in which every metric of a method has one value per fold and seed."""
    cells = []
    for method, values in methods.items():
        for (fold, seed), value in values.items():
            overall = {"perplexity": value, "bleu4": value}
            test = {"overall": overall, "tasks": {"dolly": {"perplexity": 2 * value}}}
            cells.append(
                {"backbone": "b", "method": method, "fold": fold, "seed": seed, "status": "done", "test": test}
            )
    cells.append({"backbone": "b", "method": "lora", "fold": 2, "seed": 0, "status": "failed", "error": "x"})
    return {"cells": cells, "study": {"reference": "hycam"}}


def test_mean_and_sample_deviation() -> None:
    assert summarise([2.0, 4.0, 9.0]) == Summary(5.0, pytest.approx(math.sqrt(13)), 3)
    assert summarise([2.0]) == Summary(2.0, None, 1)
    assert summarise([]) is None


def test_paired_t_test_on_known_numbers() -> None:
    """Differences 1, 2, 3 have t = 2 sqrt(3), and with two degrees of freedom p = 1 - t / sqrt(2 + t^2)."""
    t, p = paired_t_test([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) or (0, 0)
    assert t == pytest.approx(2 * math.sqrt(3))
    assert p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert p == pytest.approx(2 * stats.t.sf(t, df=2))
    # an unpaired test of the same numbers would say something else
    assert p != pytest.approx(stats.ttest_ind([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]).pvalue)


def test_no_test_without_two_pairs_or_a_difference() -> None:
    assert paired_t_test([1.0], [2.0]) is None
    assert paired_t_test([1.0, 2.0], [1.0, 2.0]) is None


@pytest.mark.parametrize("shift", [0.1, 1.0, 1e-9])
def test_differences_that_do_not_vary_are_no_test(shift: float) -> None:
    """Equal but for their rounding, they would give a p of 0 and a star."""
    values = [2.1, 3.7, 5.3, 11.9]
    assert paired_t_test(values, [value + shift for value in values]) is None
    shifted = {pair: value - shift for pair, value in _LORA.items()}
    compared = against_best_baseline(_record(hycam=shifted, lora=_LORA), "b", "perplexity", ["lora"])
    assert compared is not None and compared.better
    assert not compared.significant and compared.verdict == "no test: equal differences"


def test_scores_are_those_of_finished_cells() -> None:
    record = _record(lora=_LORA)
    assert scores(record, "b", "lora", "perplexity") == _LORA
    assert scores(record, "b", "lora", "perplexity", "dolly")[1, 1] == 30.0
    assert scores(record, "b", "lora", "rougeL") == {}
    assert scores(record, "other", "lora", "perplexity") == {}


def test_the_best_baseline_is_that_of_the_better_mean() -> None:
    """Lower perplexity (LoRA's 13 of 13 and 13.25), higher BLEU (MoE-LoRA's)."""
    record = _record(hycam=_HYCAM, lora=_LORA, moelora=_MOELORA)
    compared = against_best_baseline(record, "b", "perplexity", ["lora", "moelora"])
    assert compared is not None
    expected = stats.ttest_rel(list(_HYCAM.values()), list(_LORA.values()))
    assert (compared.baseline, compared.pairs) == ("lora", 4)
    assert (compared.reference_mean, compared.baseline_mean) == (11.5, 13.0)
    assert compared.p == pytest.approx(expected.pvalue) and compared.t == pytest.approx(expected.statistic)
    # differences -1, -2, -1, -2: t = -1.5 / (sqrt(1/3) / 2), p = 0.0138
    assert compared.t == pytest.approx(-1.5 * 2 * math.sqrt(3))
    assert compared.significant and compared.verdict == "better"

    compared = against_best_baseline(record, "b", "bleu4", ["lora", "moelora"])
    assert compared is not None and compared.baseline == "moelora"
    assert not compared.better and compared.verdict == "not significant"

    compared = against_best_baseline(record, "b", "bleu4", ["lora"])
    assert compared is not None and compared.verdict == "worse"


def test_only_shared_folds_and_seeds_are_paired() -> None:
    record = _record(hycam=_HYCAM, lora={(0, 1): 13.0, (1, 0): 13.0, (3, 3): 1.0}, moelora={(7, 7): 1.0})
    compared = against_best_baseline(record, "b", "perplexity", ["lora", "moelora"])
    assert compared is not None
    assert (compared.baseline, compared.pairs, compared.reference_mean, compared.baseline_mean) == ("lora", 2, 11.5, 13)
    assert against_best_baseline(record, "b", "perplexity", ["moelora"]) is None
    one = against_best_baseline(_record(hycam=_HYCAM, lora={(0, 0): 1.0}), "b", "perplexity", ["lora"])
    assert one is not None and one.p is None and one.verdict == "no test: fewer than two pairs"
