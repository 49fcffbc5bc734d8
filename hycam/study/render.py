"""Tables as Markdown, LaTeX (booktabs) and JSON."""

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from hycam.study.statistics import Summary
from hycam.training.callbacks import finite, write_whole

TABLES_FOLDER = "tables"

_MISSING = "-"
_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "†": r"$^{\dagger}$",
    "*": "$^{*}$",
}


@dataclass(frozen=True)
class Number:
    """A mean with its spread, for a cell of a table.

    Attributes:
        value, std: the mean, and the standard deviation over `count` values where there are several.
        digits: shown behind the point.
        mark: of a significant difference.
    """

    value: float
    std: float | None
    digits: int
    mark: str = ""
    count: int = 1

    @classmethod
    def of(cls, summary: Summary | None, digits: int, mark: str = "") -> "Number | None":
        """None of no values. Where no digit is shown, the spread of zero is left out."""
        if summary is None:
            return None
        std = None if digits == 0 and summary.std == 0 else summary.std
        return cls(summary.mean, std, digits, mark, summary.count)

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:,.{self.digits}f}"
        return f"{self.value:,.{self.digits}f}{spread}{self.mark}"


@dataclass(frozen=True)
class Row:
    """One line: `section` is the heading that it stands under, with the rows beside it that have the same."""

    section: str
    cells: Sequence[Number | str | None]


@dataclass(frozen=True)
class Table:
    """Attributes:
    name: of the paper's table or figure.
    notes: sentences below it.
    """

    name: str
    title: str
    columns: list[str]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def sections(self) -> Iterator[tuple[str, list[Row]]]:
        for section, rows in groupby(self.rows, key=lambda row: row.section):
            yield section, list(rows)


def shown(cell: Number | str | None) -> str:
    return _MISSING if cell is None else str(cell)


def markdown(table: Table) -> str:
    lines = [f"## {table.title}", ""]
    for section, rows in table.sections():
        if section:
            lines += [f"### {section}", ""]
        lines += [_markdown_line(table.columns), "| --- |" + " ---: |" * (len(table.columns) - 1)]
        lines += [_markdown_line([shown(cell) for cell in row.cells]) for row in rows]
        lines.append("")
    for note in table.notes:
        lines += [_escaped(note), ""]
    return "\n".join(lines)


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"


def _escaped(text: str) -> str:
    # entities: not every Markdown knows an angle bracket behind a backslash
    return re.sub(r"([|*\\_`])", r"\\\1", text).replace("<", "&lt;").replace(">", "&gt;")


def latex(table: Table) -> str:
    """A `table` environment; it needs the package booktabs."""
    width = len(table.columns)
    lines = [
        r"\begin{table}",
        r"  \centering",
        f"  \\caption{{{_tex(table.title)}}}",
        f"  \\begin{{tabular}}{{l{'r' * (width - 1)}}}",
        r"    \toprule",
        f"    {_tex_line(table.columns)}",
    ]
    for section, rows in table.sections():
        lines.append(r"    \midrule")
        if section:
            lines.append(f"    \\multicolumn{{{width}}}{{l}}{{\\textit{{{_tex(section)}}}}} \\\\")
        lines += [f"    {_tex_line([shown(cell) for cell in row.cells])}" for row in rows]
    lines += [r"    \bottomrule", r"  \end{tabular}"]
    lines += [f"  \\par\\footnotesize {_tex(note)}" for note in table.notes]
    return "\n".join([*lines, r"\end{table}", ""])


def _tex_line(cells: Sequence[str]) -> str:
    return " & ".join(_tex(cell) for cell in cells) + r" \\"


def _tex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _plain(table: Table) -> dict[str, Any]:
    rows = [
        {
            "section": row.section,
            "cells": [dataclasses.asdict(cell) if isinstance(cell, Number) else cell for cell in row.cells],
        }
        for row in table.rows
    ]
    return {"name": table.name, "title": table.title, "columns": table.columns, "rows": rows, "notes": table.notes}


def write_tables(output: Path, tables: Sequence[Table]) -> Path:
    """Write `tables.md`, `tables.tex` and `tables.json` into `tables` in the folder `output`, and return that."""
    folder = output / TABLES_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "tables.md", "\n".join(markdown(table) for table in tables))
    write_whole(folder / "tables.tex", "\n".join(latex(table) for table in tables))
    write_whole(
        folder / "tables.json",
        json.dumps(finite([_plain(table) for table in tables]), indent=1, allow_nan=False) + "\n",
    )
    return folder
