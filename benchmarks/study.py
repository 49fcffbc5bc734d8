"""The studies of the docs, drawn from their committed records: ``python -m benchmarks.study [--check]``.

A folder of `STUDIES` has what `hycam compare` and `hycam report` recorded; figures and tables are drawn from it, and
the pages' tables, between ``<!-- table: NAME -->`` and ``<!-- end -->``, are those of its ``tables``; on a page of two
studies their names begin with the folder's, ``settings-table5``. The home page and README have a summary of
`docs/study`.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.pages import fill, markdown
from benchmarks.harness.record import ROOT
from hycam.reporting.report import write_report
from hycam.study.render import Number

STUDY = ROOT / "docs" / "study"
# folder -> the pages that show its tables
STUDIES = {
    STUDY: (ROOT / "docs" / "study.md", ROOT / "docs" / "index.md", ROOT / "README.md"),
    ROOT / "docs" / "study_small": (ROOT / "docs" / "study-small.md",),
    ROOT / "docs" / "settings_laptop": (ROOT / "docs" / "choosing.md",),
    ROOT / "docs" / "settings": (ROOT / "docs" / "choosing.md",),
}

# the summary's methods, where the study has run them, by their names in the tables
_SUMMARY = {
    "backbone alone": "backbone alone",
    "hycam": "HyCAM",
    "hycam_r52": "HyCAM of rank 52",
    "shared_only": "HyCAM without experts",
    "lora": "LoRA",
    "moelora": "MoE-LoRA",
    "full": "full fine-tuning",
}


def drawn(study: Path) -> dict[str, str]:
    """Name -> Markdown of the tables that a report wrote, their titles left to the page; and of the `summary`.

    Each by its name, and by one that begins with the folder's.
    """
    tables = _tables(study)
    if "forgetting" in tables:
        tables["summary"] = _summary(study)
    return tables | {f"{study.name}-{name}": table for name, table in tables.items()}


def _tables(study: Path) -> dict[str, str]:
    folder = study / "tables"
    names = [table["name"] for table in json.loads((folder / "tables.json").read_text(encoding="utf-8"))]
    bodies = re.split(r"^## .*\n", (folder / "tables.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {
        name: re.sub(r"^### (.*)$", r"**\1**", f"{body.strip()}\n", flags=re.MULTILINE)
        for name, body in zip(names, bodies, strict=True)
    }


def _summary(study: Path) -> str:
    """Some methods: what they train, what they gain on the tasks, and what they lose on other text."""
    tables = {table["name"]: table for table in json.loads((study / "tables" / "tables.json").read_text("utf-8"))}
    cells = {
        name: {row["cells"][0]: dict(zip(table["columns"], row["cells"], strict=True)) for row in table["rows"]}
        for name, table in tables.items()
    }
    before = next(iter(cells["forgetting"].values()))["PPL before"]
    lines = []
    for method, shown in _SUMMARY.items():
        if cells["table2"].get(method, {}).get("PPL") is None:
            continue
        general = cells["forgetting"][method]["PPL after"] if method in cells["forgetting"] else before
        of_method = cells["table2"][method]
        lines.append([shown, *(_shown(cell) for cell in (of_method["trained parameters"], of_method["PPL"], general))])
    return markdown(["", "trained parameters", "perplexity of the tasks", "of other text"], lines)


def _shown(cell: dict[str, Any] | None) -> str:
    return "-" if cell is None else str(Number(**cell | {"digits": min(cell["digits"], 2), "mark": ""}))


def outdated(study: Path) -> list[str]:
    """Tables and figures' data that the records don't give; pictures differ with the version that drew them."""
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder)
        shutil.copy2(study / "study.json", again)
        if (study / "data").is_dir():
            shutil.copytree(study / "data", again / "data")
        write_report(again, again, pictures=False, announce=lambda line: None)
        made = {path.relative_to(again): path.read_bytes() for path in _texts(again)}
    found = {path.relative_to(study): path.read_bytes() for path in _texts(study)}
    return sorted(str(name) for name in made.keys() | found.keys() if made.get(name) != found.get(name))


def _texts(study: Path) -> list[Path]:
    return [*(study / "tables").iterdir(), *(study / "figures").glob("*.json")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something isn't up to date")
    options = parser.parse_args(arguments)
    stale = []
    for study, pages in STUDIES.items():
        if not options.check:
            write_report(study, study)
        tables = drawn(study)
        stale += outdated(study) if options.check else []
        for page in pages:
            before = page.read_text(encoding="utf-8")
            after = fill(before, tables.get)
            if not options.check:
                page.write_text(after, encoding="utf-8")
            elif after != before:
                stale.append(page.name)
    if stale:
        names = ", ".join(dict.fromkeys(stale))
        print(f"{names}: not what the records give, run `python -m benchmarks.study`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
