"""`hycam generate`: prompts and their files, sampling, what it prints and writes."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from hycam.commands.generate import read_rows
from hycam_cli import main
from tests.commands.invocation import error_line
from tests.training.runs import rows, save_backbone, save_rows


def test_generate(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--evaluation.max_new_tokens", "4"]
    assert main(["generate", str(run), "--prompt", "Say the colour of cat 1", *short]) == 0
    one = capsys.readouterr().out.rstrip("\n")
    file = save_rows(tmp_path / "prompts.jsonl", [{"instruction": "Say the colour of cat 1"}, rows(2)[1]])
    output = tmp_path / "answers.jsonl"
    assert main(["generate", str(run), "--file", str(file), "--output", str(output), *short]) == 0
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["instruction"] for answer in answers] == ["Say the colour of cat 1", rows(2)[1]["instruction"]]
    assert answers[0]["response"] == one
    capsys.readouterr()
    assert main(["generate", str(run), "--base", "--raw", "--prompt", "cat", *short]) == 0
    raw = capsys.readouterr().out.rstrip("\n")
    assert raw and raw != one


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"instruction": "a"}\n{"instruction": 3}\n', "p.jsonl:2: instruction: got 3, wanted text"),
        ("p.jsonl", "{\n", "p.jsonl:1: broken JSON"),
        ("p.json", '{"instruction": "a"}', "p.json: a dict, wanted an array of rows"),
        ("p.txt", "\n\n", "p.txt: empty"),
        ("p.csv", "a\n1\n", "p.csv: row 1: instruction: got None, wanted text"),
        ("p.pdf", "a\n", "p.pdf: wanted one of .txt, .json, .jsonl, .parquet, .csv"),
    ],
)
def test_files_of_prompts_are_checked_first(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
    message: str,
) -> None:
    import hycam.commands.generate as module

    monkeypatch.setattr(module, "load_selected_tokenizer", None)
    (tmp_path / name).write_text(text)
    assert message in error_line(capsys, "generate", str(run), "--file", str(tmp_path / name))


def test_a_file_of_prompts_may_have_the_columns_of_a_task(tmp_path: Path) -> None:
    fields = [{"instruction": "frage", "output": "antwort"}, {"instruction": "text", "input": "kontext"}]
    (tmp_path / "p.csv").write_text("text,kontext\nWhich?,The first\n")
    (tmp_path / "q.tsv").write_text("frage\tinput\nWhat?\tThat\n")
    assert list(read_rows(tmp_path / "p.csv", fields).values()) == [{"instruction": "Which?", "input": "The first"}]
    assert list(read_rows(tmp_path / "q.tsv", fields).values()) == [{"instruction": "What?", "input": "That"}]


def test_a_file_of_prompts_has_a_row_for_each_line_alone(tmp_path: Path) -> None:
    """Text may hold U+2028 and U+0085, which `--output` writes as they are; lines may end as on Windows."""
    instructions = ["one\u2028line", "and\u0085another", "a third"]
    lines = [json.dumps({"instruction": text}, ensure_ascii=False) for text in instructions]
    for end in ("\n", "\r\n"):
        for name, texts in (("p.jsonl", lines), ("p.txt", instructions)):
            (tmp_path / name).write_bytes((end.join(texts) + end).encode())
            assert [row["instruction"] for row in read_rows(tmp_path / name).values()] == instructions


def test_what_eval_and_generate_refuse(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "backbone: missing" in error_line(capsys, "eval", "--task", "dolly")
    assert "tasks: none given" in error_line(capsys, "eval", "--backbone.name_or_path", "x")
    assert "has no adapter_config.json" in error_line(capsys, "generate", "--adapter", str(tmp_path), "--prompt", "x")
    assert "is no folder" in error_line(capsys, "eval", str(run), "--output", str(tmp_path / "no" / "x.json"))
    other = save_backbone(tmp_path / "other", hidden_size=64)
    adapter, short = ["--adapter", str(run / "adapter")], ["--evaluation.max_new_tokens", "4"]
    message = error_line(capsys, "generate", *adapter, "--backbone.name_or_path", str(other), "--prompt", "x", *short)
    assert "can't be loaded into" in message


def test_an_adapter_of_a_later_version_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = shutil.copytree(run / "adapter", tmp_path / "adapter") / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 7}))
    message = error_line(capsys, "generate", "--adapter", str(file.parent), "--prompt", "x")
    assert message.startswith(f"--adapter: {file}: format_version: got 7, which a later version wrote; hycam-kernels")


def test_a_prompt_that_is_too_long_is_found_before_the_model_is_loaded(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import hycam.commands.generate as module

    monkeypatch.setattr(module, "load_selected_model", None)
    message = error_line(capsys, "generate", str(run), "--prompt", "word " * 200, "--evaluation.max_new_tokens", "4")
    assert "prompts: prompt 0 has" in message and "exceeds the model's 128 positions" in message


def test_generate_samples_where_it_is_asked_to(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(*options: str) -> str:
        assert main(["generate", str(run), "--prompt", "Say the colour of cat 1", *options]) == 0
        return capsys.readouterr().out

    short = answer("--max-new-tokens", "1")
    greedy = answer("--max-new-tokens", "8")
    assert greedy.startswith(short.strip()) and len(short) < len(greedy)
    assert answer("--max-new-tokens", "8", "--top-k", "1") == greedy
    drawn = [answer("--max-new-tokens", "8", "--temperature", "5", "--seed", str(seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_generate_streams_to_a_terminal(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same text, written piece by piece; a file gets it whole."""
    prompt = ["generate", str(run), "--prompt", "Say the colour of cat 1", "--max-new-tokens", "12"]
    assert main(prompt) == 0
    whole = capsys.readouterr().out
    pieces: list[str] = []
    with monkeypatch.context() as terminal:
        terminal.setattr(sys.stdout, "isatty", lambda: True)
        write = sys.stdout.write
        terminal.setattr(sys.stdout, "write", lambda text: (pieces.append(text), write(text))[1])
        assert main(prompt) == 0
        assert capsys.readouterr().out == whole == "".join(pieces)
        assert len([piece for piece in pieces if piece.strip()]) > 1
        assert main([*prompt, "--output", str(tmp_path / "answer.jsonl")]) == 0
        assert capsys.readouterr().out.startswith("1 responses written to")


def test_a_prompt_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    for name, text in (
        ("a.txt", "Hello"),
        ("a.jsonl", '{"instruction": "Hello"}'),
        ("a.json", '[{"instruction": "Hello"}]'),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        (row,) = read_rows(tmp_path / name).values()
        assert row["instruction"] == "Hello"


def test_one_overlong_prompt_leaves_the_others_answered(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    file.write_text("first\n" + "long " * 200 + "\nthird\n")
    options = ["--evaluation.max_new_tokens", "3", "--output", str(output)]
    assert main(["generate", str(run), "--file", str(file), *options]) == 0
    answered = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["instruction"] for row in answered] == ["first", "third"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert line.startswith(f"hycam: left out: {file}:2: the prompt has ") and line.endswith("128 positions")
