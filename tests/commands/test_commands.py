"""The command as a user meets it: exit status, one line of error, what it prints and writes."""

import importlib.metadata
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import hycam_cli
from hycam.commands.generate import read_rows
from hycam.commands.tables import metrics_table, show
from hycam_cli import main, split_overrides
from tests.training.runs import recipe_values, rows, save_backbone, save_recipe, save_rows

COMMANDS = ["train", "eval", "generate", "plan", "report", "exec", "env"]


def _python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


_MAIN = "import sys; from hycam_cli import main; sys.exit(main())"
_ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(hycam_cli.__file__).parents[1])}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that `hycam train` made; its parent has the recipe, the rows and the backbone."""
    folder = tmp_path_factory.mktemp("cli")
    values = recipe_values(folder, save_backbone(folder / "backbone"))
    recipe = save_recipe(folder, values)
    assert main(["train", str(recipe), "--trainer.max_steps", "4"]) == 0
    return folder / "run"


def _error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an invocation that fails with status 2."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("hycam: error: ")
    return captured.err.removeprefix("hycam: error: ").rstrip("\n")


def _usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as status:
        main(list(arguments))
    assert status.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def test_help_imports_no_torch_and_is_quick() -> None:
    code = (
        "import sys, time; start = time.process_time(); from hycam_cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as status: assert not status.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert time.process_time() - start < 1, time.process_time() - start"
    )
    for command in [[], *([name] for name in COMMANDS)]:
        done = subprocess.run(_python(code, *command, "--help"), env=_ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "usage: hycam" in done.stdout
        if not command:
            assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--resum"], "unrecognized arguments: --resum"),
        (["train", "--resume", "--overwrite"], "not allowed with argument"),
        (["train", "--seed"], "--seed: expected a value"),
        (["generate"], "one of the arguments --prompt --file is required"),
        (["env", "--seed", "3"], "unrecognized arguments: --seed"),
        (["report"], "the following arguments are required: study"),
        (["report", "runs/study", "--seed", "3"], "unrecognized arguments: --seed"),
        (["eval", "--split", "tests"], "invalid choice: 'tests'"),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in _usage_error(capsys, *arguments)


def test_overrides_are_parted_from_the_commands_own_arguments() -> None:
    own, overrides = split_overrides(
        ["train", "--output-dir", "x", "r.yaml", "--data.max_length=3", "--trainer.weight_decay", "-1", "--resume"]
    )
    assert own == ["train", "r.yaml", "--resume"]
    assert overrides == [("output_dir", "x"), ("data.max_length", "3"), ("trainer.weight_decay", "-1")]


def test_a_hyphen_in_a_dotted_name_is_left_alone() -> None:
    """A study names its methods and backbones itself."""
    _, overrides = split_overrides(["compare", "s.yaml", "--learning-rates=[1]", "--methods.my-lora.r", "8"])
    assert overrides == [("learning_rates", "[1]"), ("methods.my-lora.r", "8")]


def test_train_writes_the_run_and_prints_its_tables(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(run.parent / "recipe.yaml")
    message = _error(capsys, "train", recipe)
    assert message == f"output_dir: {run} holds a run: --resume goes on with it, --overwrite deletes it"
    assert main(["train", str(run), "--resume"]) == 0
    output = capsys.readouterr().out
    assert "parameters are trained" in output
    assert "test split" in output and "expert load" in output
    for task in ("colours", "animals", "overall"):
        assert task in output
    assert "--resume: the run in" in _error(capsys, "train", recipe, "--resume")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"max_lenght": 64}}, "recipe.yaml: data.max_lenght: unknown field; did you mean 'max_length'?"),
        ({"trainer": {"learning_rate": "high"}}, "recipe.yaml: trainer.learning_rate: got 'high' (str), wanted float"),
        ({"backbone": {"name_or_path": "./nothing"}}, "backbone.name_or_path: ./nothing: no such folder"),
        ({"backbone": {"name_or_path": "models/of/nobody"}}, "name_or_path: models/of/nobody: no such folder"),
        ({"tasks": [{"name": "b", "source": "broken.jsonl"}]}, "broken.jsonl:2"),
        ({"tasks": [{"name": "f", "source": "fieldless.jsonl"}]}, "fieldless.jsonl:1: output"),
        ({"tasks": [{"name": "e", "source": "empty.jsonl"}]}, "empty.jsonl"),
        ({"tasks": [{"name": "m", "source": "missing.jsonl"}]}, "missing.jsonl"),
        ({"tasks": [{"name": "doly"}]}, "doly"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    good = json.dumps(rows(1)[0])
    (tmp_path / "broken.jsonl").write_text(f"{good}\n{{'no json'\n")
    (tmp_path / "fieldless.jsonl").write_text('{"instruction": "a", "input": ""}\n')
    (tmp_path / "empty.jsonl").write_text("")
    save_recipe(tmp_path, recipe_values(tmp_path, run.parent / "backbone", **change))
    assert message in _error(capsys, "train", "recipe.yaml")
    assert not (tmp_path / "run").exists()


def test_the_demo_replaces_its_own_run_but_no_other(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for the demo's recipe, which takes minutes."""
    import hycam.training.recipe as module

    demo = save_recipe(
        tmp_path,
        recipe_values(tmp_path, run.parent / "backbone", trainer={"max_steps": 1, "save_steps": 1, "eval_steps": 1}),
    )
    monkeypatch.setattr(module, "packaged_recipes", lambda: {"demo": demo})
    assert main(["train"]) == 0
    written = (tmp_path / "run" / "results.json").stat().st_mtime_ns
    assert main(["train"]) == 0
    assert (tmp_path / "run" / "results.json").stat().st_mtime_ns > written
    assert "holds a run" in _error(capsys, "train", "demo")
    assert "holds a run" in _error(capsys, "train", "--output_dir", str(run))


def test_eval_of_a_run_and_of_its_backbone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = json.loads((run / "results.json").read_text())["test"]
    assert main(["eval", str(run), "--evaluation.max_new_tokens", "4"]) == 0
    output = capsys.readouterr().out
    assert "BLEU-4" in output and "ROUGE-L" in output
    adapted = json.loads((run / "eval-test.json").read_text())
    assert adapted["overall"]["nll"] == pytest.approx(results["adapted"]["overall"]["nll"], rel=1e-6)
    assert {"bleu4", "rougeL"} <= adapted["tasks"]["colours"].keys()
    assert adapted["adapter"] == str(run / "adapter")
    output_file = run.parent / "base.json"
    assert main(["eval", str(run), "--base", "--no-generation", "--output", str(output_file)]) == 0
    base = json.loads(output_file.read_text())
    assert base["adapter"] is None
    assert base["overall"] == results["base"]["overall"]
    assert main(["eval", "--adapter", str(run / "adapter"), "--no-generation", "--output", str(output_file)]) == 0
    assert json.loads(output_file.read_text())["overall"] == {
        name: adapted["overall"][name] for name in ("nll", "tokens", "perplexity", "row_average")
    }


def test_another_adapters_numbers_are_no_runs_own(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint's go beside those of the run's adapter, in a file of their own."""
    own = run / "eval-validation.json"
    arguments = ["--split", "validation", "--no-generation"]
    assert main(["eval", "--adapter", str(run / "adapter"), *arguments]) == 0
    before = own.read_text()
    checkpoint = min(run.glob("checkpoint-*"))
    assert main(["eval", "--adapter", str(checkpoint), *arguments]) == 0
    beside = json.loads((run / f"eval-{checkpoint.name}-validation.json").read_text())
    assert beside["adapter"] == str(checkpoint) and own.read_text() == before
    elsewhere = tmp_path / "adapter"
    shutil.copytree(checkpoint, elsewhere)
    assert main(["eval", str(run), "--adapter", str(elsewhere), *arguments]) == 0
    assert (run / "eval-adapter-validation.json").is_file() and own.read_text() == before


def test_eval_with_flags_alone(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows_file = save_rows(tmp_path / "mine.jsonl", rows(12))
    backbone = str(run.parent / "backbone")
    arguments = ["eval", "--backbone.name_or_path", backbone, "--task", f"mine={rows_file}", "--split", "all"]
    assert main([*arguments, "--data.max_length", "64", "--data.prompt", "chat", "--no-generation"]) == 0
    report = json.loads((tmp_path / "eval-all.json").read_text())
    assert list(report["tasks"]) == ["mine"]
    assert report["split"] == "all"
    assert report["overall"]["tokens"] > 12


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
    assert message in _error(capsys, "generate", str(run), "--file", str(tmp_path / name))


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
    assert "backbone: missing" in _error(capsys, "eval", "--task", "dolly")
    assert "tasks: none given" in _error(capsys, "eval", "--backbone.name_or_path", "x")
    assert "has no adapter_config.json" in _error(capsys, "generate", "--adapter", str(tmp_path), "--prompt", "x")
    assert "is no folder" in _error(capsys, "eval", str(run), "--output", str(tmp_path / "no" / "x.json"))
    other = save_backbone(tmp_path / "other", hidden_size=64)
    adapter, short = ["--adapter", str(run / "adapter")], ["--evaluation.max_new_tokens", "4"]
    message = _error(capsys, "generate", *adapter, "--backbone.name_or_path", str(other), "--prompt", "x", *short)
    assert "can't be loaded into" in message


def test_a_run_that_was_stopped_says_how_to_go_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped, ignore=shutil.ignore_patterns("adapter"))
    newest = max(stopped.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    message = _error(capsys, "generate", str(stopped), "--prompt", "x")
    assert message.endswith(f"--resume goes on with it, --adapter {newest} takes what it had saved")
    assert main(["generate", "--adapter", str(newest), "--prompt", "x", "--evaluation.max_new_tokens", "4"]) == 0
    message = _error(capsys, "generate", str(newest), "--prompt", "x")
    assert message.endswith(f"{newest}: the folder has no recipe.yaml; --adapter takes the folder of an adapter")
    for folder in stopped.glob("checkpoint-*"):
        shutil.rmtree(folder)
    assert _error(capsys, "eval", str(stopped)).endswith("--resume goes on with it")


def test_rows_that_no_fold_parts_are_measured_whole(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_rows(tmp_path / "own.jsonl", rows(2))
    options = ["--task", f"own={source}", "--no-generation", "--output", str(tmp_path / "own.json")]
    assert "fold 0: no row of 2 falls to the" in _error(capsys, "eval", str(run), *options)
    assert main(["eval", str(run), *options, "--split", "all"]) == 0
    assert json.loads((tmp_path / "own.json").read_text())["tasks"]["own"]["tokens"] > 0


@pytest.mark.parametrize(
    ("value", "shown"), [(84.4123, "84.412"), (99999.4, "99999.400"), (9655604.503, "9.66e+06"), (math.inf, "inf")]
)
def test_a_perplexity_is_shown_in_the_digits_that_say_something(
    value: float, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"perplexity": value, "tokens": 3}
    show(metrics_table("test split", {"base": {"tasks": {"a": entry}, "overall": entry}}))
    assert capsys.readouterr().out.count(f" {shown} ") == 2


def test_an_adapter_of_a_later_version_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = shutil.copytree(run / "adapter", tmp_path / "adapter") / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 7}))
    message = _error(capsys, "generate", "--adapter", str(file.parent), "--prompt", "x")
    assert message.startswith(f"--adapter: {file}: format_version: got 7, which a later version wrote; hycam-kernels")


def test_a_prompt_that_is_too_long_is_found_before_the_model_is_loaded(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import hycam.commands.generate as module

    monkeypatch.setattr(module, "load_selected_model", None)
    message = _error(capsys, "generate", str(run), "--prompt", "word " * 200, "--evaluation.max_new_tokens", "4")
    assert "prompts: prompt 0 has" in message and "exceeds the model's 128 positions" in message


def test_env_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"]
    assert report["devices"][0]["device"] == "cpu"
    assert {choice["dtype"] for choice in report["backends"]} == {"bfloat16", "float32"}
    assert all(choice["backend"].split(":")[0] in ("torch", "triton") for choice in report["backends"])
    assert main(["env"]) == 0
    assert "hycam_modulation" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_train_as_one(run: Path, tmp_path: Path) -> None:
    """Data-parallel over two processes of half the batch: the same losses up to the order of the sums."""
    losses = []
    for name, batch, launcher in (
        ("one", 4, []),
        ("two", 2, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        values = recipe_values(folder, run.parent / "backbone", method={"noise": "never"})
        values["trainer"] |= {"max_steps": 4, "per_device_train_batch_size": batch}
        command = [sys.executable, *launcher, "-m", "hycam", "train", str(save_recipe(folder, values))]
        done = subprocess.run(command, env=_ENVIRONMENT, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("parameters are trained") == 1
        lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
        losses.append([line[key] for line in lines for key in ("loss", "eval_loss") if key in line])
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_sigterm_to_the_process(run: Path, tmp_path: Path) -> None:
    values = recipe_values(
        tmp_path, run.parent / "backbone", trainer={"max_steps": 100_000, "eval_strategy": "no", "save_steps": 100_000}
    )
    values["trainer"] |= {"load_best_model_at_end": False}
    recipe = save_recipe(tmp_path, values)
    process = subprocess.Popen(
        _python(_MAIN, "train", str(recipe)),
        env=_ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.stat().st_size) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    # other packages' messages, the Trainer's log among them, aren't on stdout
    assert len(output.splitlines()) == 1
    assert "parameters are trained" in output
    last = errors.strip().splitlines()[-1]
    assert last.startswith("hycam: error: stopped by SIGTERM after step ")
    assert last.endswith(f"go on with: hycam train {tmp_path / 'run'} --resume")
    checkpoints = list((tmp_path / "run").glob("checkpoint-*/trainer_state.json"))
    assert len(checkpoints) == 1


def test_tables_are_never_cut(capsys, monkeypatch):
    """In 40 columns, and in a file, every number is there; of two reports there is the gain."""
    monkeypatch.setenv("COLUMNS", "40")
    report = {"perplexity": 98765.432, "bleu4": 12.34, "rougeL": 56.78, "tokens": 1_234_567}
    better = report | {"perplexity": 9876.5432, "bleu4": 23.45, "rougeL": 50.0}
    reports = {name: {"tasks": {"a_task": values}, "overall": values} for name, values in
               (("base", report), ("adapted", better))}  # fmt: skip
    show(metrics_table("test split", reports))
    shown = capsys.readouterr().out
    for number in ("98765.432", "9876.543", "10.0 x", "12.34", "+11.11", "56.78", "-6.78", "1,234,567", "a_task"):
        assert number in shown
    assert "…" not in shown
    show(metrics_table("test split", {"base": reports["base"]}))
    shown = capsys.readouterr().out
    assert "gain" not in shown and "A BLEU-4 of 0" not in shown
    report["bleu4"] = 0.0
    show(metrics_table("test split", reports))
    assert "A BLEU-4 of 0: no run of four tokens matched" in " ".join(capsys.readouterr().out.split())


def test_the_version_is_the_installed_package_s(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"hycam-kernels {importlib.metadata.version('hycam-kernels')}\n"


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


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--temperature", "0", "a number above 0"),
        ("--temperature", "nan", "a number above 0"),
        ("--top-p", "1.5", "at most 1"),
        ("--top-k", "0", "an integer of 1 or more"),
        ("--max-new-tokens", "none", "an integer of 1 or more"),
    ],
)
def test_sampling_options_that_make_no_sense(option, value, wanted, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", "nowhere", "--prompt", "x", option, value])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert option in error and repr(value) in error and wanted in error


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


def test_an_unknown_task_lists_the_recipes_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--task", "nosuch"]) == 2
    assert (
        "--task: 'nosuch' is none of the recipe's (colours, animals), nor a known set (auto_cot"
        in capsys.readouterr().err
    )


def test_no_bar_is_drawn_into_a_file(run: Path) -> None:
    done = subprocess.run(
        _python(_MAIN, "eval", str(run), "--evaluation.max_new_tokens", "2"), env=_ENVIRONMENT, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert b"\r" not in done.stdout + done.stderr
