"""Tables from a record by hand: means, spreads, marks, and what is said of cells that are missing."""

import json
from pathlib import Path
from typing import Any

import pytest

from hycam.study.render import Number, Row, Table, latex, markdown, shown, write_tables
from hycam.study.statistics import Summary
from hycam.study.tables import study_tables

_METHODS: dict[str, Any] = {
    "full": {"name": "full"},
    "lora": {"name": "lora"},
    "hycam": {"name": "hycam", "r": 4},
    "shared_only": {"preset": "shared_only", "r": 4},
    "spec_only": {"preset": "spec_only"},
    "released_code": {"preset": "released_code"},
    "experts_8": {"preset": "paper", "r": 4, "num_experts": 8},
    "experts_2": {"r": 4, "num_experts": 2},
}
_SEEDS = (0, 1, 2)
# perplexities of the three seeds; half of it is that of the task `a`, twice that of `b`
_PERPLEXITY = {
    "full": (8.0, 9.0, 10.5),
    "lora": (20.0, 21.25, 22.5),
    "hycam": (18.0, 19.0, 20.0),
    "shared_only": (30.0, 31.0, 32.0),
    "spec_only": (40.0, 40.0, 40.0),
    "released_code": (50.0, 51.0, 52.0),
    "experts_8": (17.0, 17.0, 17.0),
    "experts_2": (19.0, 19.0, 19.0),
}


def _cell(backbone: str, method: str, seed: int, perplexity: float) -> dict[str, Any]:
    def report(value: float) -> dict[str, Any]:
        return {"perplexity": value, "bleu4": 100 - value}

    return {
        "backbone": backbone,
        "method": method,
        "fold": 0,
        "seed": seed,
        "status": "done",
        "learning_rate": 3e-4,
        "test": {
            "overall": report(perplexity),
            "tasks": {"a": report(perplexity / 2), "b": report(perplexity * 2)},
        },
        "base": {"overall": report(99.0), "tasks": {"a": report(90.0), "b": report(80.0)}},
        "parameters": {"trainable": 1000, "total": 4000},
        "train_seconds": 10.0 + seed,
        "peak_bytes": 2**30,
        "steps": 7,
    }


def _record(**study: Any) -> dict[str, Any]:
    cells = [
        _cell(backbone, method, seed, value * scale)
        for backbone, scale in (("small", 1.0), ("large", 0.5))
        for method, values in _PERPLEXITY.items()
        for seed, value in zip(_SEEDS, values, strict=True)
    ]
    recipe = {
        "backbones": {"small": {"name_or_path": "x"}, "large": {"name_or_path": "y"}},
        "methods": _METHODS,
        "tasks": [{"name": "a"}, {"name": "b"}],
        "seeds": list(_SEEDS),
        "families": {"Tiny": ["small", "large"]},
    }
    return {"study": recipe | {"reference": "hycam"} | study, "cells": cells, "planned": len(cells)}


def _table(name: str, record: dict[str, Any]) -> Table:
    (table,) = (table for table in study_tables(record) if table.name == name)
    return table


def _cells(table: Table, section: str) -> dict[str, list[str]]:
    rows = [row for row in table.rows if row.section == section]
    return {shown(row.cells[0]): [shown(cell) for cell in row.cells[1:]] for row in rows}


def test_methods_and_their_costs() -> None:
    table = _table("table2", _record())
    small = _cells(table, "small")
    assert list(small) == ["backbone alone", "full", "lora", "hycam", "shared_only", "released_code"]
    costs = ["0.0003", "1,000", "25.00", "7", "1.57 ± 0.14", "1.00 ± 0.00"]
    assert small["lora"] == ["21.250 ± 1.250", "78.75 ± 1.25", *costs]
    assert small["backbone alone"] == ["99.000", "1.00", *["-"] * 6]
    assert table.columns[1:4] == ["PPL", "BLEU-4", "learning rate"]
    assert _cells(table, "large")["full"][0] == "4.583 ± 0.629"


@pytest.mark.parametrize("order", [1, -1])
def test_the_backbone_alone_is_not_that_of_a_method_with_its_own_dtype(order: int) -> None:
    own = _METHODS | {"full": {"name": "full", "backbone": {"dtype": "float32"}}}
    record = _record(methods=own)
    for cell in record["cells"]:
        if cell["method"] == "full":
            cell["base"] = cell["base"] | {"overall": {"perplexity": 98.0, "bleu4": None}}
    record["cells"] = record["cells"][::order]
    table = _table("table2", record)
    assert _cells(table, "small")["backbone alone"][0] == "99.000"
    assert not [note for note in table.notes if "is not finite" in note], "nothing of that base is shown"
    record["cells"] = [cell for cell in record["cells"] if cell["method"] == "full"]
    assert _cells(_table("table2", record), "small")["backbone alone"][0] == "98.000"


def test_what_a_run_saved_is_shown_where_it_is_known() -> None:
    record = _record()
    assert "saved, MiB" not in _table("table2", record).columns
    for cell in record["cells"]:
        if cell["method"] == "lora":
            cell["saved_bytes"] = 3 * 2**20
    table = _table("table2", record)
    place = table.columns.index("saved, MiB") - 1
    small = _cells(table, "small")
    assert (small["lora"][place], small["hycam"][place]) == ("3.0", "-")


def test_a_bleu_of_0_is_explained_below_the_tables() -> None:
    record = _record()
    names = ("table2", "table5", "table6", "figure3")
    for cell in record["cells"]:
        for report in (cell["test"], cell["base"]):
            for values in (report["overall"], *report["tasks"].values()):
                values["bleu4"] = 7.0
    assert not any("A BLEU-4 of 0" in note for name in names for note in _table(name, record).notes)
    record["cells"][0]["test"]["tasks"]["a"]["bleu4"] = 0.0
    for name in names:
        assert any(note.startswith("A BLEU-4 of 0: no run of four tokens") for note in _table(name, record).notes)


def test_the_reference_is_marked_where_it_differs() -> None:
    """Against LoRA, the one PEFT baseline: differences -2, -2.25, -2.5; full fine-tuning is none."""
    assert _cells(_table("table2", _record()), "small")["hycam"][:2] == ["19.000 ± 1.000*", "81.00 ± 1.00*"]
    worse = _cells(_table("table2", _record(baselines=["full"])), "small")["hycam"][0]
    assert worse == "19.000 ± 1.000†"
    record = _record()
    for cell in record["cells"]:
        if cell["method"] == "lora" and cell["seed"] == 0:
            cell["test"]["overall"]["perplexity"] = 10.0
    assert _cells(_table("table2", record), "small")["hycam"][0] == "19.000 ± 1.000"


def test_significance_says_what_was_tested() -> None:
    table = _table("significance", _record())
    rows = [row for row in table.rows if row.section == "small" and row.cells[:2] == ["overall", "PPL"]]
    assert [shown(cell) for cell in rows[0].cells] == [
        "overall", "PPL", "lora", "21.250", "19.000", "3", "-15.59", "0.0041", "better"
    ]  # fmt: skip
    assert len(table.rows) == 2 * 3 * 2
    assert "of lora; not corrected" in table.notes[0]


def test_without_a_second_seed_one_line_says_that_nothing_was_tested() -> None:
    record = _record(seeds=[0])
    record["cells"] = [cell for cell in record["cells"] if cell["seed"] == 0]
    (row,) = _table("significance", record).rows
    assert [shown(cell) for cell in row.cells] == [
        "all", "all", "-", "-", "-", "1", "-", "-", "no test: one fold and seed"
    ]  # fmt: skip


def test_sizes_stand_side_by_side() -> None:
    table = _table("table3-4", _record())
    assert table.title == "Backbone sizes: Tiny"
    assert table.columns == ["method", "small: PPL", "small: BLEU-4", "large: PPL", "large: BLEU-4"]
    assert _cells(table, "")["full"] == ["9.167 ± 1.258", "90.83 ± 1.26", "4.583 ± 0.629", "95.42 ± 0.63"]


def test_per_task() -> None:
    table = _table("table5", _record())
    assert table.columns == ["method", "a", "b", "overall"]
    assert _cells(table, "small, PPL")["hycam"] == ["9.500 ± 0.500*", "38.000 ± 2.000*", "19.000 ± 1.000*"]
    assert _cells(table, "small, PPL")["backbone alone"] == ["90.000", "80.000", "99.000"]
    assert list(_cells(table, "large, BLEU-4")) == ["backbone alone", *_METHODS]


def test_ablations_and_the_number_of_experts() -> None:
    ablations = _cells(_table("table6", _record()), "small")
    assert list(ablations) == ["hycam", "shared_only", "spec_only"]
    assert ablations["spec_only"] == ["40.000 ± 0.000", "60.00 ± 0.00", "1,000"]
    sweep = _cells(_table("figure3", _record()), "small")
    assert {experts: cells[0] for experts, cells in sweep.items()} == {
        "2": "19.000 ± 0.000",
        "5": "19.000 ± 1.000",
        "8": "17.000 ± 0.000",
    }


def test_tables_without_rows_are_left_out() -> None:
    record = _record(methods={name: _METHODS[name] for name in ("lora", "hycam")}, families={})
    assert [table.name for table in study_tables(record)] == ["table2", "table5", "significance"]


def test_missing_and_failed_cells_are_named() -> None:
    record = _record()
    record["cells"] = [
        cell for cell in record["cells"] if (cell["backbone"], cell["method"], cell["seed"]) != ("small", "lora", 2)
    ]
    failed = {"backbone": "small", "method": "lora", "fold": 0, "seed": 2, "status": "failed", "error": "no memory"}
    table = _table("table2", record | {"cells": [*record["cells"], failed]})
    assert "lora on small: 2 of 3 cells; failed: fold 0, seed 2: no memory." in table.notes
    assert not [note for note in _table("table2", _record()).notes if " of 3 cells" in note]
    empty = _table("table2", _record() | {"cells": []})
    assert "hycam on large: 0 of 3 cells." in empty.notes


def test_numbers_that_are_not_finite_are_named_and_in_no_mean() -> None:
    record = _record()
    for cell in record["cells"]:
        if cell["backbone"] == "small":
            cell["base"]["tasks"]["a"]["perplexity"] = None
        if (cell["backbone"], cell["method"]) == ("small", "full") or (cell["seed"] == 1 and cell["method"] == "lora"):
            cell["test"]["overall"]["perplexity"] = None
    tables = {table.name: table for table in study_tables(record)}
    small = _cells(tables["table2"], "small")
    assert small["full"][:2] == ["-", "90.83 ± 1.26"] and small["lora"][0] == "21.250 ± 1.768"
    assert _cells(tables["table5"], "small, PPL")["backbone alone"] == ["-", "80.000", "99.000"]
    end = "PPL is not finite (overall), and in no mean or test."
    named = [
        "backbone alone on small, fold 0: PPL is not finite (a), and in no mean or test.",
        *(f"full on small, fold 0, seed {seed}: {end}" for seed in (0, 1, 2)),
        *(f"lora on {backbone}, fold 0, seed 1: {end}" for backbone in ("small", "large")),
    ]
    for table in tables.values():
        assert [note for note in table.notes if "not finite" in note] == named
    compared = next(row.cells for row in tables["significance"].rows if row.section == "small")
    assert [shown(cell) for cell in compared[2:6]] == ["lora", "21.250", "19.000", "2"]
    assert not [note for table in study_tables(_record()) for note in table.notes if "not finite" in note]


def test_the_averaging_rule_is_named() -> None:
    for table in study_tables(_record()):
        if table.name != "significance":
            assert "over all tasks' tokens, never a mean of the tasks' perplexities" in table.notes[0]


def test_numbers() -> None:
    assert Number.of(None, 3) is None
    assert str(Number.of(Summary(1234.5678, 0.25, 3), 2, "*")) == "1,234.57 ± 0.25*"
    assert str(Number.of(Summary(5.0, 0.0, 3), 0)) == "5"
    assert str(Number.of(Summary(5.0, None, 1), 1)) == "5.0"


_ROWS = [Row("100%", ["lo_ra", Number(1.5, 0.5, 1, "†")]), Row("100%", ["x|y", None])]
_SMALL = Table("t", "A & B", ["method", "p_1"], _ROWS, ["p < 1"])


def test_markdown() -> None:
    assert markdown(_SMALL) == (
        "## A & B\n\n### 100%\n\n| method | p\\_1 |\n| --- | ---: |\n"
        "| lo\\_ra | 1.5 ± 0.5† |\n| x\\|y | - |\n\np &lt; 1\n"
    )


def test_latex() -> None:
    text = latex(_SMALL)
    assert "\\caption{A \\& B}" in text and "\\begin{tabular}{lr}" in text
    assert "\\multicolumn{2}{l}{\\textit{100\\%}} \\\\" in text
    assert "lo\\_ra & 1.5 $\\pm$ 0.5$^{\\dagger}$ \\\\" in text
    assert "p $<$ 1" in text
    assert [line.strip() for line in text.splitlines() if "rule" in line] == ["\\toprule", "\\midrule", "\\bottomrule"]


def test_files(tmp_path: Path) -> None:
    folder = write_tables(tmp_path, study_tables(_record()))
    assert folder == tmp_path / "tables"
    assert (folder / "tables.md").read_text().count("\n## ") == 5
    assert (folder / "tables.tex").read_text().count("\\begin{table}") == 6
    tables = json.loads((folder / "tables.json").read_text())
    (row,) = (row for row in tables[0]["rows"] if row["section"] == "small" and row["cells"][0] == "hycam")
    assert row["cells"][1] == {"value": 19.0, "std": pytest.approx(1.0), "digits": 3, "mark": "*", "count": 3}
