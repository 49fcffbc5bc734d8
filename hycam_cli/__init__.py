"""The `hycam` command: its parser alone, so that `hycam --help` answers without importing torch.

It stands outside the package `hycam` because importing that one imports PEFT (see its registration there).
"""

import argparse
import importlib.metadata
import math
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

# The recipe's top-level fields, which are options of their own; a nested field's option has a dot.
RECIPE_FIELDS = (
    "seed",
    "output_dir",
    "backbone",
    "method",
    "tasks",
    "data",
    "trainer",
    "early_stopping",
    "evaluation",
)

# Those of a study's recipe that a run's has not.
STUDY_FIELDS = (
    "seeds",
    "folds",
    "backbones",
    "methods",
    "learning_rates",
    "widen_rates",
    "reference",
    "baselines",
    "families",
    "keep",
)

# What `hycam plan` can count.
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")

_RECIPE_HELP = (
    "recipe: a YAML file, the folder of a run, or the name of one that ships (paper, released_code, laptop, demo)"
)
_OVERRIDES = """\
Every field of the recipe can be set here too, as --section.field VALUE, VALUE being YAML:
  --seed 3   --output_dir runs/x   --trainer.learning_rate 1e-4   --tasks.0.max_rows 100
  --backbone llama-3.1-8b   --method.num_experts 8   --early_stopping null
  --tasks '[{name: dolly}, {name: mine, source: mine.jsonl}]'
Sections: backbone, method, tasks, data, trainer (any field of transformers.TrainingArguments),
early_stopping, evaluation; and the plain fields seed and output_dir.
"""

_EXEC_HELP = """\
It loads adapters where nothing imports hycam:
  hycam exec lm-eval --model hf --model_args pretrained=BACKBONE,peft=ADAPTER --tasks TASKS
"""


_STUDY_OVERRIDES = """\
Every field of the study can be set here too, as --section.field VALUE, VALUE being YAML:
  --seeds '[0, 1, 2]'   --output_dir runs/x   --learning_rates '[1e-4, 1e-3]'   --widen_rates 2
  --methods.lora.r 8   --backbones.small.dtype float32   --trainer.max_steps 200
Sections: backbones, methods, families, tasks, data, trainer (any field of transformers.TrainingArguments),
early_stopping, evaluation; and the plain fields seeds, folds, learning_rates, widen_rates, reference, baselines,
keep and output_dir. Of backbones and methods, those that the study has.
"""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class _Version(argparse.Action):
    """Prints the installed package's version, which only then is looked up."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: object) -> NoReturn:
        print(f"hycam-kernels {importlib.metadata.version('hycam-kernels')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hycam",
        description="HyCAM: train multi-task adapters, evaluate them, generate with them.",
        epilog="`hycam COMMAND --help` describes each command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and end")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    train = _add(commands, "train", "train an adapter as a recipe says (without one: the built-in demo)")
    train.add_argument(
        "recipe", nargs="?", help=f"{_RECIPE_HELP}; without one the demo, which replaces its own earlier run"
    )
    folder = train.add_mutually_exclusive_group()
    folder.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint of output_dir")
    folder.add_argument("--overwrite", action="store_true", help="delete the run that output_dir holds, and start")

    evaluate = _add(commands, "eval", "perplexity, BLEU-4 and ROUGE-L of a backbone or an adapter, per task")
    evaluate.add_argument("recipe", nargs="?", help=f"{_RECIPE_HELP}; a run's folder brings its adapter")
    _adapter_options(evaluate)
    evaluate.add_argument("--task", action="append", metavar="NAME[=SOURCE]", help="evaluate this task (repeatable)")
    evaluate.add_argument("--split", choices=["train", "validation", "test", "all"], default="test")
    evaluate.add_argument("--no-generation", action="store_true", help="perplexity only")
    evaluate.add_argument("--output", metavar="FILE", help="write the numbers here as JSON")

    generate = _add(commands, "generate", "answer one prompt, or every row of a file")
    generate.add_argument("recipe", nargs="?", help=f"{_RECIPE_HELP}; a run's folder brings its adapter")
    _adapter_options(generate)
    prompts = generate.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="one instruction")
    prompts.add_argument(
        "--file", metavar="FILE", help="instructions: .txt (one a line), or rows with the columns of training rows"
    )
    generate.add_argument("--max-new-tokens", type=_count, metavar="N", help="of an answer, at most")
    sampling = generate.add_argument_group("sampling", "greedy without any of these; --seed N repeats what was drawn")
    sampling.add_argument("--temperature", type=_positive, metavar="T", help="divides the logits: 1 leaves them")
    sampling.add_argument("--top-p", type=_share, metavar="P", help="the likeliest tokens of this share alone")
    sampling.add_argument("--top-k", type=_count, metavar="K", help="the K likeliest tokens alone")
    generate.add_argument("--raw", action="store_true", help="give the text to the model without a template")
    generate.add_argument("--output", metavar="FILE", help="write the responses here as JSON lines")

    plan = _add(commands, "plan", "the memory of a run per GPU, before anything is loaded")
    plan.add_argument("recipe", help=f"{_RECIPE_HELP}; or a study: each of its methods on each of its backbones")
    plan.add_argument(
        "--world-size", type=_count, nargs="+", default=[1], metavar="N", help="numbers of GPUs (default: 1)"
    )
    plan.add_argument("--engine", choices=ENGINES, help="instead of the one that the recipe's trainer section names")
    plan.add_argument("--json", action="store_true", help="print JSON, in bytes, instead of a table")

    compare = _add(
        commands,
        "compare",
        "train and measure several methods under equal conditions, and write the tables",
        epilog=_STUDY_OVERRIDES,
    )
    compare.add_argument(
        "study", help="study: a YAML file, the folder of a study, or the name of one that ships (study_laptop, ...)"
    )

    report = _add(
        commands, "report", "figures and tables of a study, and what is measured of its models for them", epilog=None
    )
    report.add_argument("study", help="folder of a study; with its study.json alone everything is drawn from records")
    report.add_argument("--output", metavar="FOLDER", help="the report's folder (default: report, in the study's)")
    report.add_argument(
        "--text", metavar="FILE", help="JSON lines with a text each: what the methods have forgotten of general text"
    )
    report.add_argument("--hide-text", action="store_true", help="no text of the study's rows in any figure")

    other = _add(
        commands, "exec", "run another package's command with HyCAM's adapters known to PEFT in it", epilog=_EXEC_HELP
    )
    other.add_argument("tool", metavar="TOOL", help="the command, as one would call it by itself")
    other.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="its own arguments, unchanged")

    env = _add(commands, "env", "versions, devices, and which backend of the op would run and why", epilog=None)
    env.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted an integer of 1 or more")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number above 0")
    return value


def _share(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number above 0 and at most 1")
    return value


def _add(
    commands: "argparse._SubParsersAction[_Parser]", name: str, summary: str, epilog: str | None = _OVERRIDES
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _adapter_options(command: argparse.ArgumentParser) -> None:
    adapter = command.add_mutually_exclusive_group()
    adapter.add_argument("--adapter", metavar="FOLDER", help="the adapter to load")
    adapter.add_argument("--base", action="store_true", help="the backbone alone, though the run has an adapter")


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Part the recipe's fields (`--section.field VALUE`, `--section.field=VALUE`) from the command's own arguments.

    A `-` in a name without a dot stands for `_`; in a dotted one it may be part of a study's own name of a method. All
    that follows `exec` is another command's.
    """
    if list(arguments[:1]) == ["exec"]:
        return list(arguments), []
    own: list[str] = []
    overrides: list[tuple[str, str]] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name if "." in name else name.replace("-", "_")
        if not argument.startswith("--") or ("." not in name and name not in RECIPE_FIELDS + STUDY_FIELDS):
            own.append(argument)
            continue
        if not equals:
            following = next(rest, None)
            if following is None:
                raise _UsageError(f"--{name}: expected a value")
            value = following
        overrides.append((name, value))
    return own, overrides


class _UsageError(Exception):
    """An option without its value."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0 when the work was done, 2 for wrong input (its one line on stderr), 128 + the signal's
        number for a run that a signal stopped, 1 for one that stopped by itself.
    """
    parser = _parser()
    try:
        own, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    except _UsageError as error:
        parser.error(str(error))
    options = parser.parse_args(own)
    if options.command in ("report", "env") and overrides:
        parser.error(f"unrecognized arguments: --{overrides[0][0]}")
    options.overrides = overrides

    # On busy cores, OpenMP threads that spin while they wait slow small models down tenfold; asleep they do no harm.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if not sys.stderr.isatty():  # a bar's carriage returns would be one endless line
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        return _run(options)
    except ImportError as error:
        if error.name is not None:  # of a module that is missing or broken, not of a version or system that is refused
            raise
        return _report(error, 2)


def _run(options: argparse.Namespace) -> int:
    # these import torch, which takes seconds
    from hycam.commands import run_command
    from hycam.errors import InputError, RunStoppedError, is_disk_full

    try:
        run_command(options.command, options)
    except InputError as error:
        return _report(error, 2)
    except RunStoppedError as error:
        return _report(error, error.exit_status)
    except OSError as error:
        if not is_disk_full(error):
            raise
        return _report(f"disk full: {error}", 1)
    except KeyboardInterrupt:
        return _report("interrupted", 130)
    return 0


def _report(message: object, status: int) -> int:
    print(f"hycam: error: {message}", file=sys.stderr)
    return status
