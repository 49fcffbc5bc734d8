"""The tables of a report's own measurements: data statistics, forgetting, routing specialisation."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hycam.analysis.routing import routing_specialisation
from hycam.analysis.token_statistics import PERCENTILES
from hycam.data.config import TaskConfig
from hycam.data.sources import origin
from hycam.reporting.measurements import Measurements
from hycam.reporting.records import Cell, cell_folder
from hycam.study.render import Number, Row, Table
from hycam.study.statistics import summarise

CellsOfBackbones = Mapping[str, Mapping[str, Sequence[Cell]]]

_SUMMARIES = ("mean", *(f"p{percentile}" for percentile in PERCENTILES), "max")


def analysis_tables(backbones: CellsOfBackbones, measurements: Measurements) -> list[Table]:
    """The tables that there are measurements for.

    Args:
        backbones: backbone -> method -> finished cells.
    """
    tables = (_data(measurements), _forgetting(backbones, measurements), _routing(backbones, measurements))
    return [table for table in tables if table.rows]


def _data(measurements: Measurements) -> Table:
    lengths_of = [f"{part}, {key}" for part in ("prompt", "response") for key in _SUMMARIES]
    columns = ["task", "rows", "tokens", "tokens per row", *lengths_of, "truncated", "dropped", "domain", "source"]
    origins = {task["name"]: origin(TaskConfig(**task)) for task in measurements.record["study"]["tasks"]}
    rows = []
    for backbone, of_folds in measurements.tokens.items():
        if not of_folds:
            continue
        first = next(iter(of_folds.values()))  # rows and lengths are the same in every fold
        for task, values in first["tasks"].items():
            lengths = [
                Number(values[part][key], None, 1 if key == "mean" else 0)
                for part in ("prompt", "response")
                for key in _SUMMARIES
            ]
            counts = [Number(values[key], None, 0) for key in ("rows", "truncated", "dropped")]
            of_row = values["prompt"]["mean"] + values["response"]["mean"]
            tokens = [Number(of_row * values["rows"], None, 0), Number(of_row, None, 1)]
            rows.append(Row(backbone, [task, counts[0], *tokens, *lengths, *counts[1:], *origins[task]]))
    notes = [
        "Tokens are the backbone's tokenizer's, before anything is cut. A prompt counts with the template's "
        "text and what the tokenizer puts before it, a response with its end token. Truncated: rows over "
        "data.max_length, whose response loses its end. Dropped: rows whose prompt leaves no room for a response.",
    ]
    return Table("table1", "Data", columns, rows, notes)


def _forgetting(backbones: CellsOfBackbones, measurements: Measurements) -> Table:
    rows = []
    for backbone, of_methods in backbones.items():
        before = measurements.text.get(backbone)
        if before is None or before["perplexity"] is None:
            continue
        for method, cells in of_methods.items():
            after = _perplexities(cells, measurements)
            change = summarise(100 * (perplexity / before["perplexity"] - 1) for perplexity in after)
            if after:
                start, end = Number(before["perplexity"], None, 3), Number.of(summarise(after), 3)
                rows.append(Row(backbone, [method, start, end, Number.of(change, 2), str(len(after))]))
    notes = [
        "Perplexity of the general text that was given, by the backbone alone and after each method: mean ± "
        "sample standard deviation over folds and seeds. Texts are cut into windows of data.max_length tokens.",
    ]
    columns = ["method", "PPL before", "PPL after", "change, %", "runs"]
    return Table("forgetting", "Forgetting of general text", columns, rows, notes)


def _perplexities(cells: Iterable[Cell], measurements: Measurements) -> list[float]:
    measured = (measurements.text.get(cell_folder(cell)) for cell in cells)
    return [values["perplexity"] for values in measured if values is not None and values["perplexity"] is not None]


def _routing(backbones: CellsOfBackbones, measurements: Measurements) -> Table:
    rows = []
    for backbone, of_methods in backbones.items():
        for method, cells in of_methods.items():
            means = [
                routing_specialisation(cell["expert_load"], tokens)["mean"]
                for cell in cells
                if "expert_load" in cell and (tokens := _test_tokens(measurements, cell)) is not None
            ]
            if means:
                rows.append(Row(backbone, [method, *_information(means), str(len(means))]))
    notes = [
        "Mutual information of the expert that a test token is routed to and the token's task, the mean over layers; "
        "routing weights count as probabilities, tasks by their tokens. 0: every task loads the experts alike. The "
        "maximum is the smaller of the tasks' entropy and ln E. Mean ± sample standard deviation over folds and seeds.",
    ]
    columns = ["method", "nats", "bits", "maximum, nats", "share of it, %", "runs"]
    return Table("routing", "Routing specialisation", columns, rows, notes)


def _information(means: Sequence[Mapping[str, Any]]) -> list[Number | None]:
    shares = [100 * mean["share"] for mean in means if mean["share"] is not None]
    return [
        *(Number.of(summarise(mean[unit] for mean in means), 4) for unit in ("nats", "bits")),
        Number.of(summarise(mean["maximum_nats"] for mean in means), 4),
        Number.of(summarise(shares), 2),
    ]


def _test_tokens(measurements: Measurements, cell: Cell) -> dict[str, int] | None:
    measured = measurements.tokens[cell["backbone"]].get(cell["fold"])
    return None if measured is None else {task: values["test_tokens"] for task, values in measured["tasks"].items()}
