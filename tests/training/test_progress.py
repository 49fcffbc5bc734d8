"""What a run says: one line an event, no carriage returns in files, nothing of packages that it doesn't use."""

import io
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainingArguments

from hycam.training.progress import ProgressLines, event_line, progress_bar, rough_time
from tests.distributed.ranks import REPOSITORY

TRAINING = {
    "loss": 1.74012, "grad_norm": 0.27591, "learning_rate": 0.004979, "balance_loss": 0.2051, "epoch": 0.14,
    "tokens_per_second": 3174.4, "padding_share": 0.24, "seconds": 2.1, "peak_bytes": 9.8e8,
}  # fmt: skip
VALIDATION = {"eval_loss": 3.285, "eval_perplexity": 26.714, "eval_code_loss": 5.3, "eval_code_perplexity": 200.61,
              "eval_mine_too_loss": 1.0, "eval_mine_too_perplexity": 2.71828, "epoch": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        (TRAINING, "loss 1.74  balance 0.205  gradient norm 0.276  rate 4.98e-03  3,174 tokens/s"),
        (VALIDATION, "validation perplexity 26.71: code 200.6, mine_too 2.718"),
        ({"loss": 2.0, "balance_loss": None, "grad_norm": None}, "loss 2"),
        (
            {"train_runtime": 61.4, "train_loss": 1.0, "steps_seconds": 58.0, "validation_seconds": 2.9},
            "trained in 61 s: 94 % steps, 5 % validation",
        ),
        ({"epoch": 1.0}, ""),
    ],
)
def test_an_event_is_a_short_line(logs, line):
    assert event_line(logs) == line


def test_lines_are_told_by_the_main_process_alone(capsys, tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    for is_main in (True, False):
        state = SimpleNamespace(is_world_process_zero=is_main, global_step=5, max_steps=200)
        lines = ProgressLines()
        lines.on_train_begin(arguments, state, TrainerControl())
        lines.on_log(arguments, state, TrainerControl(), logs=VALIDATION)
        lines.on_train_end(arguments, state, TrainerControl())
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "step 5/200  validation perplexity 26.71: code 200.6, mine_too 2.718\n"


def test_a_bar_stays_out_of_files(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, is_drawn in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(3, "training", "step") as bar:
            bar.update()
        assert ("\r" in stream.getvalue()) == is_drawn


def test_deepspeed_says_nothing_in_a_run_without_it():
    pytest.importorskip("deepspeed")
    script = (
        "import logging; from hycam.training.progress import keep_others_quiet; keep_others_quiet()\n"
        "from deepspeed.accelerator import get_accelerator; get_accelerator()\n"
        "logging.getLogger('DeepSpeed').warning('said')"
    )
    said = {}
    for is_used in ("true", "false"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | {"ACCELERATE_USE_DEEPSPEED": is_used},
        )
        assert done.returncode == 0, done.stderr
        said[is_used] = "said" in done.stdout + done.stderr
    assert said == {"true": True, "false": False}


def test_the_first_steps_tell_how_long_the_rest_takes(capsys, tmp_path, monkeypatch):
    """A resumed run's first step, which warms up, doesn't count."""
    now = [0.0]
    monkeypatch.setattr("hycam.training.progress.time.perf_counter", lambda: now[0])
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    state = SimpleNamespace(is_world_process_zero=True, global_step=100, max_steps=205)
    lines = ProgressLines()
    lines.on_train_begin(arguments, state, TrainerControl())
    for seconds in (100.0, *[3.0] * 9):
        state.global_step += 1
        now[0] += seconds
        lines.on_step_end(arguments, state, TrainerControl())
    assert capsys.readouterr().err == "step 105/205  about 5 min to go\n"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "about 0 s"), (89, "about 89 s"), (90, "about 2 min"), (5300, "about 88 min"), (12345, "about 3 h 20 min")],
)
def test_a_rough_time_has_few_figures(seconds, said):
    assert rough_time(seconds) == said
