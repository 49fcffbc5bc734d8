import re
import shutil

import pytest

from benchmarks import study
from benchmarks.harness.pages import fill
from benchmarks.study import STUDIES, STUDY, drawn, main, outdated

pytest.importorskip("sklearn")

# the one with every method
SMALL = STUDY.with_name("study_small")


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(SMALL, tmp_path / "study")


def test_the_page_and_the_report_are_what_the_records_give(monkeypatch, tmp_path, capsys):
    assert main(["--check"]) == 0
    others = {}
    for study_folder, pages in STUDIES.items():
        others[study_folder] = [tmp_path / page.name for page in pages]
        for page, other in zip(pages, others[study_folder], strict=True):
            other.write_text(re.sub(r"\| (hycam|HyCAM) \|", "| hicam |", page.read_text()))
    monkeypatch.setattr(study, "STUDIES", others)
    assert main(["--check"]) == 1
    wanted = "study.md, index.md, README.md, study-small.md, choosing.md: not what the records give"
    assert capsys.readouterr().err.startswith(wanted)


def test_a_changed_record_is_noticed(copy):
    record = copy / "study.json"
    text = record.read_text()
    record.write_text(re.sub(r'("perplexity": )\d+', r"\g<1>99", text))
    assert "tables/tables.md" in outdated(copy)


def test_a_page_has_the_tables_without_their_titles(copy):
    filled = fill("a\n<!-- table: table6 -->\nold\n<!-- end -->\nb\n", drawn(copy).__getitem__)
    assert filled == f"a\n<!-- table: table6 -->\n{drawn(copy)['table6']}\n<!-- end -->\nb\n"
    assert not re.search(r"^(#|old$)", filled, flags=re.MULTILINE)
    with pytest.raises(KeyError):
        fill("<!-- table: nothing -->\n<!-- end -->", drawn(copy).__getitem__)


@pytest.mark.parametrize("study_folder", [STUDY, SMALL])
def test_the_summary_s_numbers_are_the_tables(study_folder):
    tables = drawn(study_folder)
    head = next(line for line in tables["table2"].splitlines() if line.startswith("| method |")).split(" | ")
    for method, shown in (("hycam", "HyCAM"), ("lora", "LoRA")):
        (row,) = [line.split(" | ") for line in tables["table2"].splitlines() if line.startswith(f"| {method} |")]
        (after,) = [line.split(" | ") for line in tables["forgetting"].splitlines() if line.startswith(f"| {method} |")]
        (summed,) = [line for line in tables["summary"].splitlines() if line.startswith(f"| {shown} |")]
        cells = summed.strip("| ").split(" | ")
        assert cells[1] == row[head.index("trained parameters")]
        for cell, whole in zip(cells[2:], (row[1], after[2]), strict=True):
            assert float(cell.split(" ± ")[0]) == pytest.approx(float(whole.split(" ± ")[0]), abs=0.051)
