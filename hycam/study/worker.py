"""The process that does one unit of a study's work: alone, so that its peak memory and its failures are its own."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import torch
import yaml

from hycam.errors import InputError, NotFiniteError, RunStoppedError
from hycam.locks import claim
from hycam.study.recipe import Study
from hycam.study.units import (
    BACKBONE_SEED,
    DIVERGED,
    Unit,
    forget_failure,
    is_done,
    lock_file,
    log_file,
    record_failure,
    run_folder,
)
from hycam.training.callbacks import write_whole
from hycam.training.folder import METRICS_FILE, RECIPE_FILE, RECORD_FILE, RESULTS_FILE
from hycam.training.progress import keep_others_quiet
from hycam.training.recipe import Recipe
from hycam.training.run import train
from hycam.training.scratch import train_scratch_backbone

REPORT_SECONDS = 30.0

Outcome = Literal["done", "taken", "failed", "stopped"]


@dataclass(frozen=True)
class Order:
    """What a worker shall do.

    Attributes:
        study, unit: the work.
        recipe: of the run; None for a backbone.
        base: the backbone's own test metrics, where another cell has measured them.
        tuned: the run at the chosen learning rate, from which the cell goes on; None: it trains from the start.
    """

    study: Study
    unit: Unit
    recipe: Recipe | None
    base: dict[str, Any] | None = None
    tuned: Unit | None = None


def work_apart(
    order: Order, on_start: Callable[[BaseProcess], object], on_wait: Callable[[], object]
) -> tuple[Outcome, str]:
    """Do a unit's work in a process of its own, and wait for it.

    Args:
        on_start: is given the process.
        on_wait: is called every `REPORT_SECONDS` while it works.

    Returns:
        What became of it, and the error's one line or the signal's name. `taken`: another process is at it, or was.
    """
    # A server that has imported everything once forks the workers. Where there is an accelerator they are started
    # anew: a package may have touched its driver on import, which no forked process can use.
    context: Any = multiprocessing.get_context("spawn" if torch.accelerator.is_available() else "forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(order, sender))
    process.start()
    sender.close()
    on_start(process)
    try:
        while not receiver.poll(REPORT_SECONDS):
            on_wait()
        outcome, message = receiver.recv()
    except EOFError:
        process.join()
        outcome, message = "failed", f"the process ended with exit status {process.exitcode}"
    process.join()
    return outcome, message


def _work(order: Order, sender: Connection) -> None:
    log = log_file(order.study, order.unit)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    _obey_the_parent_alone()
    keep_others_quiet()
    with claim(lock_file(order.study, order.unit.folder)) as claimed:
        if not claimed or is_done(order.study, order.unit):
            answer: tuple[Outcome, str] = ("taken", "")
        else:
            answer = _attempt(order)
    sender.send(answer)


def _obey_the_parent_alone() -> None:
    """A terminal's Ctrl-C comes through the parent; a parent that is gone counts as SIGTERM."""
    os.setsid()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _attempt(order: Order) -> tuple[Outcome, str]:
    try:
        _do(order)
    except RunStoppedError as error:
        if error.exit_status > 128:
            return "stopped", signal.Signals(error.exit_status - 128).name
        if order.unit.tried_rate is None or not isinstance(error, NotFiniteError):
            return _failed(order, error)
        # a rate at which training breaks down is an answer of the grid, not a failure
        results = json.dumps({DIVERGED: str(error)}) + "\n"
        write_whole(run_folder(order.study, order.unit) / RESULTS_FILE, results)
    except Exception as error:  # whatever it is, the study reports it and goes on with its other runs
        return _failed(order, error)
    forget_failure(order.study, order.unit)
    return "done", ""


def _failed(order: Order, error: Exception) -> tuple[Outcome, str]:
    traceback.print_exc()
    kind = "" if isinstance(error, InputError | RunStoppedError) else f"{type(error).__name__}: "
    message = kind + next(iter(str(error).splitlines()), "")
    record_failure(order.study, order.unit, message)
    return "failed", message


def _do(order: Order) -> None:
    if order.recipe is None:
        train_scratch_backbone(
            order.study.scratch(order.unit.backbone), run_folder(order.study, order.unit), BACKBONE_SEED
        )
        return
    if order.tuned is not None:
        _go_on_from(order.study, order.tuned, order.unit, order.recipe)
    train(order.recipe, resume=True, announce=print, test=order.unit.tried_rate is None, base=order.base)


def _go_on_from(study: Study, tuned: Unit, cell: Unit, recipe: Recipe) -> None:
    """Make the run that tried the chosen rate the cell's, so that only its test is left to do.

    It is the same run: the first fold and seed at that rate. A kill in between leaves what the next attempt completes.
    """
    source, target = run_folder(study, tuned), run_folder(study, cell)
    staged = target.with_name(f"{target.name}.staged")
    checkpoints = list(source.glob("checkpoint-*"))
    if target.exists() or not (checkpoints or staged.exists()):
        return
    staged.mkdir(parents=True, exist_ok=True)
    for checkpoint in checkpoints:
        checkpoint.rename(staged / checkpoint.name)
    for name in (METRICS_FILE, RECORD_FILE):
        shutil.copy2(source / name, staged / name)
    write_whole(staged / RECIPE_FILE, yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    staged.rename(target)
