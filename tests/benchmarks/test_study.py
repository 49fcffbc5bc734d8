import re
import shutil

import pytest

from benchmarks import study
from benchmarks.harness.pages import fill
from benchmarks.study import PAGE, STUDY, drawn, main, outdated

pytest.importorskip("sklearn")


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(STUDY, tmp_path / "study")


def test_the_page_and_the_report_are_what_the_records_give(monkeypatch, tmp_path, capsys):
    assert main(["--check"]) == 0
    other = tmp_path / "study.md"
    other.write_text(PAGE.read_text().replace("| hycam |", "| hicam |"))
    monkeypatch.setattr(study, "PAGE", other)
    assert main(["--check"]) == 1
    assert capsys.readouterr().err.startswith("study.md: not what the records give")


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
