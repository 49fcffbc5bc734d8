"""Results as tables on the terminal."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from hycam.evaluation.generation import note_on_bleu

_LARGE = 1e5  # from here on digits are no information

_METRICS = (("perplexity", "perplexity"), ("bleu4", "BLEU-4"), ("rougeL", "ROUGE-L"))


def metrics_table(title: str, reports: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every metric per task and overall, a column for each report (`{"base": ..., "adapted": ...}`).

    Of two reports there is a third column, what the second gains: how many times smaller its perplexity is, or how much
    higher its score.
    """
    first = next(iter(reports.values()))
    metrics = [metric for metric in _METRICS if metric[0] in first["overall"]]
    table = Table(title=title, caption=note_on_bleu(reports.values()), caption_justify="left")
    table.add_column("task")
    for _, label in metrics:
        for name in [*reports, *(["gain"] if len(reports) == 2 else [])]:
            table.add_column(f"{label}\n{name}" if len(reports) > 1 else label, justify="right")
    table.add_column("tokens", justify="right")
    for task in first["tasks"]:
        _add_row(table, task, metrics, [report["tasks"][task] for report in reports.values()])
    table.add_section()
    _add_row(table, "overall", metrics, [report["overall"] for report in reports.values()])
    return table


def _add_row(table: Table, name: str, metrics: list[tuple[str, str]], results: list[Mapping[str, Any]]) -> None:
    numbers = []
    for key, _ in metrics:
        numbers += [_number(result[key], 3 if key == "perplexity" else 2) for result in results]
        if len(results) == 2:
            numbers.append(_gain(key, *(result[key] for result in results)))
    table.add_row(name, *numbers, f"{results[0]['tokens']:,}")


def _gain(metric: str, before: float, after: float) -> str:
    return f"{_number(before / after, 1)} x" if metric == "perplexity" else f"{after - before:+.2f}"


def _number(value: float, digits: int) -> str:
    return f"{value:.2e}" if value >= _LARGE else f"{value:.{digits}f}"


def load_table(loads: Mapping[str, Mapping[str, list[float]]]) -> Table:
    """Share of each task's tokens that goes to each expert, the mean over the adapted layers."""
    table = Table(title="expert load on the test split (mean over layers)")
    table.add_column("task")
    experts = len(next(iter(next(iter(loads.values())).values())))
    for expert in range(experts):
        table.add_column(f"expert {expert}", justify="right")
    for task, layers in loads.items():
        shares = [sum(layer[expert] for layer in layers.values()) / len(layers) for expert in range(experts)]
        table.add_row(task, *(f"{share:.3f}" for share in shares))
    return table


def show(*tables: Table) -> None:
    """Print tables: words are wrapped, numbers (columns set to the right) stay whole in the narrowest terminal."""
    for table in tables:
        needed = _set_widths(table, whole_headers=True)
        if needed > Console().width:
            needed = _set_widths(table, whole_headers=False)
        Console(width=max(Console().width, needed)).print(table)


def _set_widths(table: Table, *, whole_headers: bool) -> int:
    """Fix the widths of columns of numbers; returns the table's least width."""
    widest = Console(width=sys.maxsize)
    for column in table.columns:
        if column.justify == "right":
            header = widest.measure(column.header)
            numbers = [widest.measure(cell).maximum for cell in column.cells]  # `6.05 ± 0.01` is one
            column.width = max(header.maximum if whole_headers else header.minimum, *numbers)
    return widest.measure(table).minimum
