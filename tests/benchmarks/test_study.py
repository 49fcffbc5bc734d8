import re
import shutil

import pytest

from benchmarks import study
from benchmarks.harness.pages import fill
from benchmarks.study import PAGES, STUDY, drawn, first_page, main, outdated

pytest.importorskip("sklearn")


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(STUDY, tmp_path / "study")


def test_the_page_and_the_report_are_what_the_records_give(monkeypatch, tmp_path, capsys):
    assert main(["--check"]) == 0
    page, readme = (tmp_path / page.name for page in PAGES)
    page.write_text(PAGES[0].read_text().replace("| hycam |", "| hicam |"))
    readme.write_text(PAGES[1].read_text().replace("| LoRA |", "| LORA |"))
    monkeypatch.setattr(study, "PAGES", (page, readme))
    assert main(["--check"]) == 1
    assert capsys.readouterr().err.startswith("study.md, README.md: not what the records give")


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


def test_the_first_page_shows_the_study_numbers(copy):
    lines = first_page(copy).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| backbone alone", "| full fine-tuning", "| LoRA", "| MoE-LoRA", "| HyCAM"
    ]  # fmt: skip
    of_hycam = drawn(copy)["table2"].split("| hycam | ")[1].split(" | ")
    assert lines[-1].split(" | ")[1] == of_hycam[0]
    assert lines[-1].split(" | ")[3] == of_hycam[4]
