"""The study of `docs/study.md`, drawn from its committed records: ``python -m benchmarks.study [--check]``.

`docs/study` has what `hycam compare` and `hycam report` recorded; figures and tables are drawn from it, and the page's
tables, between ``<!-- table: NAME -->`` and ``<!-- end -->``, are those of ``docs/study/tables``. README's is the
choice of them that `first_page` makes.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.pages import fill, markdown
from benchmarks.harness.record import ROOT
from hycam.reporting.report import write_report
from hycam.study.render import Number, shown

PAGES = (ROOT / "docs" / "study.md", ROOT / "README.md")
STUDY = ROOT / "docs" / "study"


_FIRST_PAGE = {
    "backbone alone": "backbone alone",
    "full": "full fine-tuning",
    "lora": "LoRA",
    "moelora": "MoE-LoRA",
    "hycam": "HyCAM",
}


def drawn(study: Path) -> dict[str, str]:
    """Name -> Markdown of the tables that a report wrote, their titles left to the page."""
    folder = study / "tables"
    names = [table["name"] for table in json.loads((folder / "tables.json").read_text(encoding="utf-8"))]
    bodies = re.split(r"^## .*\n", (folder / "tables.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {
        name: re.sub(r"^### (.*)$", r"**\1**", f"{body.strip()}\n", flags=re.MULTILINE)
        for name, body in zip(names, bodies, strict=True)
    }


def first_page(study: Path) -> str:
    """What each of the best-known methods gets and costs: test and general perplexity, parameters, memory."""
    tables = json.loads((study / "tables" / "tables.json").read_text(encoding="utf-8"))
    cells = {table["name"]: {row["cells"][0]: dict(zip(table["columns"], row["cells"], strict=True))
                             for row in table["rows"]} for table in tables}  # fmt: skip
    methods, forgetting = cells["table2"], cells["forgetting"]
    rows = []
    for name, label in _FIRST_PAGE.items():
        of_method, kept = methods[name], forgetting.get(name)
        general = forgetting["hycam"]["PPL before"] if kept is None else kept["PPL after"]
        numbers = of_method["PPL"], general, of_method["trained parameters"], of_method["peak memory, GiB"]
        rows.append([label, *(shown(number and Number(**number)) for number in numbers)])
    header = ["", "five tasks, perplexity", "general text, perplexity", "trained parameters", "peak memory, GiB"]
    return f"{markdown(header, rows)}\n"


def outdated(study: Path) -> list[str]:
    """Tables and figures' data that the records don't give; pictures differ with the version that drew them."""
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder)
        shutil.copy2(study / "study.json", again)
        shutil.copytree(study / "data", again / "data")
        write_report(again, again, announce=lambda line: None)
        made = {path.relative_to(again): path.read_bytes() for path in _texts(again)}
    found = {path.relative_to(study): path.read_bytes() for path in _texts(study)}
    return sorted(str(name) for name in made.keys() | found.keys() if made.get(name) != found.get(name))


def _texts(study: Path) -> list[Path]:
    return [*(study / "tables").iterdir(), *(study / "figures").glob("*.json")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something isn't up to date")
    options = parser.parse_args(arguments)
    if not options.check:
        write_report(STUDY, STUDY)
    tables = drawn(STUDY) | {"first-page": first_page(STUDY)}
    before = {page: page.read_text(encoding="utf-8") for page in PAGES}
    after = {page: fill(text, tables.__getitem__) for page, text in before.items()}
    if not options.check:
        for page, text in after.items():
            page.write_text(text, encoding="utf-8")
        return 0
    stale = outdated(STUDY) + [page.name for page in PAGES if after[page] != before[page]]
    if stale:
        print(f"{', '.join(stale)}: not what the records give, run `python -m benchmarks.study`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
