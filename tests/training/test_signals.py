"""A signal stops a run at once with a checkpoint, and the run goes on to all that an undisturbed one measures."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hycam.training.callbacks as callbacks
import hycam.training.trainer as trainer
from hycam.errors import RunStoppedError
from hycam.training.callbacks import SaveOnSignal
from hycam.training.recipe import Recipe
from hycam.training.run import train
from tests.training.runs import SignalAt, also_call, assert_same_run, logged_numbers, run_recipe

_EPOCHS = {
    # four steps an epoch
    "per_device_train_batch_size": 12,
    "max_steps": -1,
    "num_train_epochs": 2,
    **dict.fromkeys(("logging_strategy", "eval_strategy", "save_strategy"), "epoch"),
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    train(run_recipe(folder, backbone))
    return folder / "run"


def _stop_at(step: int, recipe: Recipe, *, number: signal.Signals = signal.SIGTERM, times: int = 1) -> None:
    """Resume the recipe's run, and have a signal come in the middle of a step."""
    with pytest.MonkeyPatch.context() as patch:
        also_call(patch, SignalAt(number, step, times=times))
        wanted = rf"stopped by {number.name} after step {step};.*checkpoint-{step}; go on with"
        with pytest.raises(RunStoppedError, match=wanted) as stopped:
            train(recipe, resume=True)
    assert stopped.value.exit_status == 128 + number


def _stop_in_validation(step: int, recipe: Recipe, *, batch: int = 2) -> None:
    """Resume the recipe's run, and have SIGTERM come with some batch of all that it validates; a validation has two."""
    batches = []
    evaluate = trainer.evaluate_perplexity

    def evaluate_perplexity(*args: Any, progress: Any, **kwargs: Any) -> dict[str, Any]:
        def counting(done: int) -> None:
            batches.append(done)
            if len(batches) == batch:
                signal.raise_signal(signal.SIGTERM)
            progress(done)

        return evaluate(*args, progress=counting, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "evaluate_perplexity", evaluate_perplexity)
        with pytest.raises(RunStoppedError, match=rf"SIGTERM after step {step};.*checkpoint-{step}; go on"):
            train(recipe, resume=True)
    assert len(batches) == batch


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 6), (signal.SIGINT, 3)])
def test_a_signal_saves_and_stops(
    tmp_path: Path, backbone: Path, straight: Path, number: signal.Signals, step: int
) -> None:
    recipe = run_recipe(tmp_path, backbone)
    before = signal.getsignal(number)
    _stop_at(step, recipe, number=number, times=2)  # a launcher passes on what the process was sent itself
    assert signal.getsignal(number) is before
    train(recipe, resume=True)
    assert_same_run(tmp_path / "run", straight)


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """As in a terminal: what a background job starts ignores SIGINT."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("_interruptible")
def test_a_later_signal_acts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with SaveOnSignal() as on_signal:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert on_signal.received == signal.SIGINT
        monkeypatch.setattr(callbacks, "_ONE_REQUEST_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_while_the_processes_ask_each_other_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args: signal.raise_signal(signal.SIGTERM))
    with SaveOnSignal() as on_signal:
        assert on_signal.agree(torch.device("cpu")) is None  # as the other processes have it
        assert on_signal.agree(torch.device("cpu")) == signal.SIGTERM


def test_a_signal_under_epoch_strategies(tmp_path: Path, backbone: Path) -> None:
    train(run_recipe(tmp_path / "straight", backbone, trainer=_EPOCHS))
    stopped = run_recipe(tmp_path / "stopped", backbone, trainer=_EPOCHS)
    for step in (2, 4, 8):  # inside an epoch, and at the ends of both
        _stop_at(step, stopped)
    assert not [line for line in logged_numbers(tmp_path / "stopped" / "run") if line["step"] == 2]
    train(stopped, resume=True)
    assert_same_run(tmp_path / "stopped" / "run", tmp_path / "straight" / "run")


@pytest.mark.slow
def test_a_signal_at_an_epochs_end_before_its_validation(tmp_path: Path, backbone: Path) -> None:
    # where checkpoints are made by steps, and nothing else tells that an epoch has ended
    sections = {"trainer": _EPOCHS | {"save_strategy": "steps", "save_steps": 4, "load_best_model_at_end": False}}
    train(run_recipe(tmp_path / "straight", backbone, **sections))
    stopped = run_recipe(tmp_path / "stopped", backbone, **sections)
    _stop_in_validation(4, stopped)
    train(stopped, resume=True)
    assert_same_run(tmp_path / "stopped" / "run", tmp_path / "straight" / "run")


def test_a_signal_during_validation_saves_at_once(tmp_path: Path, backbone: Path, straight: Path) -> None:
    recipe = run_recipe(tmp_path, backbone)
    for step, batch in ((4, 2), (4, 1), (8, 4)):
        _stop_in_validation(step, recipe, batch=batch)
    for _ in range(2):  # the second time there is nothing left to train
        train(recipe, resume=True)
        assert_same_run(tmp_path / "run", straight)


def test_a_validation_that_was_interrupted_stops_early(tmp_path: Path, backbone: Path) -> None:
    # no later loss is better by so much
    sections = {"early_stopping": {"patience": 1, "threshold": 100.0}, "trainer": {"eval_steps": 2, "save_steps": 2}}
    assert train(run_recipe(tmp_path / "straight", backbone, **sections))["steps"] == 4
    stopped = run_recipe(tmp_path / "stopped", backbone, **sections)
    _stop_in_validation(4, stopped, batch=4)
    train(stopped, resume=True)
    assert_same_run(tmp_path / "stopped" / "run", tmp_path / "straight" / "run")


@pytest.mark.slow
def test_the_first_validation_is_made_once(tmp_path: Path, backbone: Path) -> None:
    sections = {"trainer": {"eval_on_start": True}}
    train(run_recipe(tmp_path / "straight", backbone, **sections))
    stopped = run_recipe(tmp_path / "stopped", backbone, **sections)
    for _ in range(2):
        _stop_in_validation(0, stopped)
    _stop_at(3, stopped)
    train(stopped, resume=True)
    assert_same_run(tmp_path / "stopped" / "run", tmp_path / "straight" / "run")
