"""The parser: help without torch, overrides, arguments that make no sense."""

import importlib.metadata
import subprocess
import sys

import pytest

from hycam_cli import main, split_overrides
from tests.commands.invocation import ENVIRONMENT

COMMANDS = ["train", "eval", "generate", "plan", "report", "exec", "env"]


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
        done = subprocess.run(
            [sys.executable, "-c", code, *command, "--help"], env=ENVIRONMENT, capture_output=True, text=True
        )
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


def test_the_version_is_the_installed_package_s(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"hycam-kernels {importlib.metadata.version('hycam-kernels')}\n"


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
