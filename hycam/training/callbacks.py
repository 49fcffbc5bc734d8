"""What a run does beside training: its metrics file, signals, gradients that are not finite."""

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hycam.adapter.attention import HyCAMAttention
from hycam.adapter.binding import router_statistics
from hycam.errors import InputError, NotFiniteError

PARTIAL_SUFFIX = ".partial"

# A launcher forwards a signal that the job manager, or the terminal, has sent to its processes as well; torchrun does
# so at once, DeepSpeed's multi-node launcher a second time after 0.1 s. On busy cores it may take a few seconds.
_ONE_REQUEST_SECONDS = 5.0


def write_whole(path: Path, text: str) -> None:
    """Write a file that a kill leaves as it was or as it shall be, never cut short."""
    partial = path.with_suffix(PARTIAL_SUFFIX)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


class MetricsFile(TrainerCallback):
    """Appends every log event to a file as one JSON object per line.

    Each line has `step`, `epoch` and what was logged; the training loss's lines have `layers` too: per adapted layer
    the balance loss and the experts' load [E] of the last micro-batch. A number that is not finite is written as null.
    On resuming, lines past the checkpoint's step, of a validation that is made again, and a line that a kill cut short
    are dropped first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        lines = [line for line in _whole_lines(self.path) if line["step"] <= state.global_step]
        if state.global_step == 0 or validation_is_due(state):
            lines = [line for line in lines if line["step"] < state.global_step or "eval_loss" not in line]
        write_whole(self.path, "".join(map(_json_line, lines)))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        line: dict[str, Any] = {"step": state.global_step, **logs}
        if "loss" in logs and model is not None:
            line["layers"] = layer_statistics(model)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_json_line(line))


def layer_statistics(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Balance loss and load [E] of each layer's last forward, keyed by module path; none without HyCAM's experts."""
    if not any(isinstance(module, HyCAMAttention) for module in model.modules()):
        return {}
    return {
        name: {"balance_loss": statistics.balance_loss.item(), "load": statistics.load.tolist()}
        for name, statistics in router_statistics(model).items()
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics file. Raises `InputError` with the line where it isn't what a run writes."""
    return _whole_lines(path)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    del rest  # what follows the last newline: nothing, or a line that a kill cut short
    return [_event(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _event(line: bytes, place: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
        if isinstance(event, dict) and isinstance(event.get("step"), int):
            losses = [value for key, value in event.items() if key.endswith("loss")]
            if all(value is None or isinstance(value, int | float) for value in losses):
                return event
        reason = "no object with a step and losses that are numbers"
    except ValueError as error:
        reason = str(error)
    raise InputError(f"{place}: damaged, wanted the log events as the run wrote them: {reason}")


def _json_line(values: dict[str, Any]) -> str:
    return json.dumps(finite(values), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """`value` for strict JSON: numbers that are not finite become null, at any depth."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class LossWindow(TrainerCallback, ExportableState):
    """The training loss since the last log. It lies in checkpoints, so that a resumed run logs the same means.

    Attributes:
        total: this process's sum over micro-batches: a float, or a 0-d float32 tensor on the model's device.
        totals: those of all processes when the checkpoint was made; sums, for a mean would round differently.
        since: the step of the last log.
    """

    def __init__(self) -> None:
        self.total: float | torch.Tensor = 0.0
        self.totals: list[float] = []
        self.since = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"totals": self.totals, "since": self.since}}


class DueValidation(TrainerCallback, ExportableState):
    """Whether the step's validation is still to be made. It lies in checkpoints: a resumed run makes it first."""

    def __init__(self) -> None:
        self.due = False

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"due": self.due}}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.due = control.should_evaluate

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.due = control.should_evaluate

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.due = False


def validation_is_due(state: TrainerState) -> bool:
    """Whether a checkpoint was made before its step's validation."""
    # a mapping from callback to state, although transformers annotates a list of callbacks
    stateful: Any = state.stateful_callbacks
    return stateful.get(DueValidation.__name__, {}).get("attributes", {}).get("due", False)


class Throughput(TrainerCallback):
    """Counts tokens and time of this process's training steps since the last log.

    Attributes:
        spent: seconds of this process's training by what they went to: `steps`, `validation`, `checkpoints`.
    """

    def __init__(self) -> None:
        self._started = 0.0
        self.spent = dict.fromkeys(("steps", "validation", "checkpoints"), 0.0)
        self._clear()

    def _clear(self) -> None:
        self.seconds = 0.0
        self.positions = 0
        self.tokens: int | torch.Tensor = 0  # on the batches' device: reading each count would wait for the device

    def begin(self) -> None:
        """A step begins: its batches are about to be fetched."""
        self._started = time.perf_counter()

    def count(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Add a step's micro-batches: padded with an `attention_mask`, or packed."""
        for batch in batches:
            self.positions += batch["input_ids"].numel()
            mask = batch.get("attention_mask")
            self.tokens = self.tokens + (batch["input_ids"].numel() if mask is None else mask.sum())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self._started
        self.seconds += seconds
        self.spent["steps"] += seconds

    @contextmanager
    def spending_on(self, what: str) -> Iterator[None]:
        """Count the time that this takes for `what`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spent[what] += time.perf_counter() - began

    def take(self, device: torch.device) -> dict[str, float]:
        """What the processes have counted together, and begin anew.

        Returns:
            `tokens_per_second` of all processes (without padding), `padding_share` of the positions, `seconds` that the
            steps took, validation and checkpoints left out, and `peak_bytes`: the most memory that a process has had
            since it began: allocated on its accelerator, resident on a CPU.
        """
        sums = torch.tensor([int(self.tokens), self.positions], dtype=torch.float64, device=device)
        largest = torch.tensor([self.seconds, _peak_bytes(device)], dtype=torch.float64, device=device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        (tokens, positions), (seconds, peak) = sums.tolist(), largest.tolist()
        self._clear()
        return {
            "tokens_per_second": tokens / seconds,
            "padding_share": 1 - tokens / positions,
            "seconds": seconds,
            "peak_bytes": peak,
        }


def _peak_bytes(device: torch.device) -> int:
    module = torch.get_device_module(device)
    if hasattr(module, "max_memory_allocated"):
        return module.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: there a program begins with its parent's ru_maxrss, however much that is
        (high_water,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(high_water.split()[1]) * 1024
    import resource  # not on Windows, where no run gets here

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class FiniteGradients(TrainerCallback):
    """Stops the run before a gradient that is not finite reaches the weights.

    Under fp16 an overflow is expected: the loss scaler skips that step.
    """

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if args.fp16 or model is None:
            return
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            raise NotFiniteError(f"the gradient is not finite at step {state.global_step + 1}")


class SaveOnSignal(TrainerCallback):
    """Within its `with` block, the first SIGTERM or SIGINT saves a checkpoint after the step and ends training.

    What comes within seconds of it is the same request once more; a later one acts at once, as it would without this
    callback. Of several processes all stop where one got a signal.

    Attributes:
        received: the signal that came, else None; after `agree` that of any process.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._save_at_epoch_end = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received_at == 0.0:
            self._received_at, self.received = now, signal.Signals(number)
        elif now - self._received_at > _ONE_REQUEST_SECONDS:
            self.__exit__(None, None, None)
            signal.raise_signal(number)

    def agree(self, device: torch.device) -> signal.Signals | None:
        """The signal that any process has received; every process asks at the same point of the run."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            number = torch.tensor(self.received or 0, device=device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            if not number:
                return None  # a signal that came meanwhile is for the next time, when all processes learn of it
            self.received = signal.Signals(int(number))
        return self.received

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.agree(args.device) is not None:
            control.should_training_stop = True
        if control.should_training_stop or _ends_epoch(state):
            # what follows at once, and may log and validate too: the step's one checkpoint comes after that
            self._save_at_epoch_end, control.should_save = control.should_save, False
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_save |= self._save_at_epoch_end
        self._save_at_epoch_end = False
        if self.agree(args.device) is not None:
            control.should_training_stop = control.should_save = True
            if not _ends_epoch(state):  # the Trainer calls this wherever it stops
                control.should_log = control.should_evaluate = False
        return control


def _ends_epoch(state: TrainerState) -> bool:
    """Whether the step is its epoch's last, or the run's."""
    return state.global_step >= state.max_steps or (state.epoch or 0.0).is_integer()
