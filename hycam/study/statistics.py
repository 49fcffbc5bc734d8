"""Means over folds and seeds, and the paired test of the reference method against the best baseline."""

import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from scipy.stats import ttest_rel

# Metric -> (its label, digits behind the point, whether lower is better).
METRICS = {
    "perplexity": ("PPL", 3, True),
    "row_average": ("PPL, row average", 3, True),
    "bleu4": ("BLEU-4", 2, False),
    "rougeL": ("ROUGE-L", 2, False),
}
OVERALL = "overall"
SIGNIFICANCE_LEVEL = 0.05

Pair = tuple[int, int]  # fold and seed


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (n - 1 in the denominator; None of one value) of `count` values."""

    mean: float
    std: float | None
    count: int


@dataclass(frozen=True)
class Comparison:
    """The reference against one baseline, over the folds and seeds that both have.

    Attributes:
        reference, baseline: names of the methods.
        pairs: number of (fold, seed).
        reference_mean, baseline_mean: over the pairs.
        t, p: of the paired two-sided t-test; None where there is none (see `paired_t_test`).
        better: whether the reference has the better mean.
    """

    reference: str
    baseline: str
    pairs: int
    reference_mean: float
    baseline_mean: float
    t: float | None
    p: float | None
    better: bool

    @property
    def significant(self) -> bool:
        return self.p is not None and self.p < SIGNIFICANCE_LEVEL

    @property
    def verdict(self) -> str:
        if self.pairs < 2:
            return "no test: fewer than two pairs"
        if self.p is None:
            return "no test: equal differences"
        if not self.significant:
            return "not significant"
        return "better" if self.better else "worse"


def summarise(values: Iterable[float]) -> Summary | None:
    """None of no values."""
    values = list(values)
    if not values:
        return None
    return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def finished(record: Mapping[str, Any], backbone: str, method: str) -> list[Mapping[str, Any]]:
    """The cells of a method on a backbone that are done."""
    return [
        cell
        for cell in record["cells"]
        if (cell["backbone"], cell["method"], cell["status"]) == (backbone, method, "done")
    ]


def scores(
    record: Mapping[str, Any], backbone: str, method: str, metric: str, scope: str = OVERALL
) -> dict[Pair, float]:
    """A metric of every finished cell that has it.

    Args:
        scope: a task's name, or `overall`: over all tasks' tokens (perplexity, BLEU-4) or rows (ROUGE-L).
    """
    found = {}
    for cell in finished(record, backbone, method):
        test = cell["test"]
        value = (test["overall"] if scope == OVERALL else test["tasks"][scope]).get(metric)
        if value is not None:
            found[cell["fold"], cell["seed"]] = value
    return found


def paired_t_test(first: list[float], second: list[float]) -> tuple[float, float] | None:
    """t and two-sided p of the paired differences.

    None with fewer than two pairs, and where the differences don't vary by more than their rounding: t would be a
    difference over nothing.
    """
    if len(first) < 2:
        return None
    differences = [a - b for a, b in zip(first, second, strict=True)]
    # half a unit in the last place of each of four values, and as much of their differences
    rounding = 4 * sys.float_info.epsilon * max(map(abs, first + second))
    if max(differences) - min(differences) <= rounding:
        return None
    result = ttest_rel(first, second)
    return float(result.statistic), float(result.pvalue)


def against_best_baseline(
    record: Mapping[str, Any], backbone: str, metric: str, candidates: Iterable[str], scope: str = OVERALL
) -> Comparison | None:
    """The study's reference against the candidate with the best mean over the pairs that it shares with the reference.

    None where no candidate shares any.
    """
    reference = record["study"]["reference"]
    lower = METRICS[metric][2]
    own = scores(record, backbone, reference, metric, scope)
    ranked = []
    for name in candidates:
        other = scores(record, backbone, name, metric, scope)
        shared = sorted(own.keys() & other.keys())
        if shared:
            mean = statistics.fmean(other[pair] for pair in shared)
            ranked.append((mean if lower else -mean, name, shared, other))
    if not ranked:
        return None
    _, baseline, shared, other = min(ranked, key=lambda entry: entry[0])
    first, second = [own[pair] for pair in shared], [other[pair] for pair in shared]
    means = statistics.fmean(first), statistics.fmean(second)
    t, p = paired_t_test(first, second) or (None, None)
    return Comparison(
        reference, baseline, len(shared), *means, t, p, better=means[0] < means[1] if lower else means[0] > means[1]
    )
