"""What a run says on the terminal: a bar where there is one, and one line for each event, to files too."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

import datasets
import huggingface_hub
import transformers
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# after the first, to tell how long a run takes
_TIMED_STEPS = 4

# of a training event: its key, and how it is said
_TRAINING = {
    "loss": "loss {:.4g}",
    "balance_loss": "balance {:.3f}",
    "grad_norm": "gradient norm {:.3g}",
    "learning_rate": "rate {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
}


class ProgressLines(TrainerCallback):
    """A progress bar on a terminal (unless `disable_tqdm`), and a line for each log event, on stderr.

    After the first steps one says how long the rest may take. The first step, which warms up, doesn't count for it.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._first = 0
        self._began = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._bar = progress_bar(state.max_steps, "training", "step", quiet=args.disable_tqdm)
            self._bar.update(state.global_step)
            self._first = state.global_step + 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is None:
            return
        self._bar.update(state.global_step - self._bar.n)
        timed, left = state.global_step - self._first, state.max_steps - state.global_step
        if timed == 0:
            self._began = time.perf_counter()
        elif timed == _TIMED_STEPS and left > 0:
            estimate = rough_time((time.perf_counter() - self._began) / timed * left)
            tqdm.write(f"step {state.global_step}/{state.max_steps}  {estimate} to go", file=sys.stderr)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        line = event_line(logs or {})
        if state.is_world_process_zero and line:
            tqdm.write(f"step {state.global_step}/{state.max_steps}  {line}", file=sys.stderr)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def keep_others_quiet() -> None:
    """Keep other packages' chatter off the terminal of a command, and their bars off a stderr that is none."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        huggingface_hub.utils.logging.set_verbosity_error()
    # what transformers and PEFT will rename some day is no matter of the user's
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|peft\.")
    # PEFT looks there for the size of the vocabulary, which no adapter of ours changes
    warnings.filterwarnings("ignore", message=r"Could not find a config file in .*\.gguf", category=UserWarning)
    # where it is installed accelerate imports it, used or not
    logging.getLogger("DeepSpeed").addFilter(lambda record: os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true")


def progress_bar(total: int, what: str, unit: str, *, quiet: bool | None = False, leave: bool = True) -> tqdm:
    """A bar on stderr where that is a terminal: in a file its carriage returns would be one endless line."""
    return tqdm(total=total, desc=what, unit=unit, leave=leave, disable=True if quiet else None, dynamic_ncols=True)


def rough_time(seconds: float) -> str:
    """About how long, in two figures at most: `about 40 s`, `about 12 min`, `about 3 h 20 min`."""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"about {minutes} min" if minutes < 90 else f"about {minutes // 60} h {minutes % 60 // 10 * 10} min"


def event_line(logs: Mapping[str, Any]) -> str:
    """A log event in a few words; empty for one that says nothing of the model."""
    if "eval_loss" in logs:
        measured = {key.removeprefix("eval_"): value for key, value in logs.items() if key.endswith("_perplexity")}
        overall = measured.pop("perplexity")
        by_task = ", ".join(f"{name.removesuffix('_perplexity')} {value:.4g}" for name, value in measured.items())
        return f"validation perplexity {overall:.4g}: {by_task}"
    if "loss" in logs:
        return "  ".join(form.format(logs[key]) for key, form in _TRAINING.items() if logs.get(key) is not None)
    if "train_runtime" in logs:
        whole = logs["train_runtime"]
        parts = {key.removesuffix("_seconds"): seconds for key, seconds in logs.items() if key.endswith("_seconds")}
        shares = ", ".join(f"{100 * seconds / whole:.0f} % {what}" for what, seconds in parts.items())
        return f"trained in {whole:.0f} s: {shares}"
    return ""
