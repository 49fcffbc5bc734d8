"""A study, run: its units one after another, beside any other process that works on the same folder."""

import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import yaml

from hycam.errors import InputError, RunStoppedError
from hycam.locks import claim, is_claimed
from hycam.study.progress import UnitProgress
from hycam.study.recipe import STUDY_FILE, Study
from hycam.study.record import chosen_rate, collect, write_record
from hycam.study.units import (
    Unit,
    cells,
    edge_of,
    failure,
    is_done,
    lock_file,
    prune,
    record_failure,
    results,
    run_folder,
    tuning,
    units,
    weights,
)
from hycam.study.worker import Order, work_apart
from hycam.training.callbacks import write_whole
from hycam.training.folder import RECIPE_FILE, SPLIT_SINCE, has_own_split, recipe_values
from hycam.training.progress import rough_time
from hycam.training.recipe import Recipe
from hycam.training.recipe_files import differing_fields, read_yaml

_POLL_SECONDS = 2.0

# Fields in which a run that the folder holds may differ from the study's: none of them reaches a number. The rows of
# two sources are compared by their SHA-256.
_FREE = (
    "output_dir",
    "tasks.*.source",
    "tasks.*.domain",
    "data.cache_dir",
    "trainer.report_to",
    "trainer.disable_tqdm",
)


def _silent(line: str) -> None:
    pass


def compare(
    study: Study, announce: Callable[[str], object] = print, inform: Callable[[str], object] = _silent
) -> dict[str, Any]:
    """Do what is left of a study, and write its record after every run.

    Every unit of work (see `hycam.study.units`) is done once, by one of the processes that call this on one folder.
    What failed in an earlier call is tried again; what fails in this one is recorded, and the rest goes on.

    Args:
        announce: is told, a line each, what became of every unit.
        inform: is told, a line each, which unit begins, how far it is, and which best rate is the edge of its grid.

    Returns:
        What `study.json` holds.

    Raises:
        InputError: the folder holds runs of other recipes or rows.
        RunStoppedError: a signal; the run in progress has saved a checkpoint, and the same call goes on.
    """
    for backbone, method in itertools.product(study.backbones, study.methods):
        recipe = study.recipe(backbone, method, fold=0, seed=0, learning_rate=1.0, folder=".")
        for warning in recipe.method.losses_in_16_bits(recipe.backbone.dtype, recipe.trainer):
            announce(f"{backbone}, {method}: {warning}")
    runner = _Runner(study, announce, inform)
    with _open_folder(study), runner.stoppable():
        while runner.step():
            pass
    return write_record(study)


@contextmanager
def _open_folder(study: Study) -> Iterator[None]:
    """Make the folder the study's, for as long as this process works on it.

    Raises:
        InputError: it holds a run of another recipe, or another process works on another study in it.
    """
    path, session = study.output_path / STUDY_FILE, lock_file(study, "session")
    with ExitStack() as stack:
        with claim(lock_file(study, "study"), wait=True):
            _check_folder(study)
            if path.is_file() and is_claimed(session, shared=True):
                running, own = ({**values, "output_dir": ""} for values in (read_yaml(path), study.to_dict()))
                changed = differing_fields(running, own)
                if changed:
                    raise InputError(f"{path}: another process works on it with other values of {', '.join(changed)}")
            write_whole(path, yaml.safe_dump(study.to_dict(), sort_keys=False))
            stack.enter_context(claim(session, wait=True, shared=True))
        yield


class _Runner:
    """One process's share in a study.

    Attributes:
        started: when, in seconds of the epoch; failures of before don't count.
        received: the signal that asks to stop.
    """

    def __init__(self, study: Study, announce: Callable[[str], object], inform: Callable[[str], object]) -> None:
        self.study, self.announce, self.inform = study, announce, inform
        self.started = time.time()
        self.received: signal.Signals | None = None
        self._worker: BaseProcess | None = None
        self._took: list[float] = []  # the seconds of each unit done
        self._warned: set[tuple[str, str]] = set()

    @property
    def units(self) -> list[Unit]:
        """All of the study's work, as far as results say what it is: a grid may still be widened."""
        return units(self.study)

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Within it, SIGTERM and SIGINT reach the worker, once, as the signal to save and stop."""
        previous: dict[signal.Signals, Any] = {}

        def receive(number: int, frame: FrameType | None) -> None:
            first, self.received = self.received is None, signal.Signals(number)
            if self._worker is not None and self._worker.is_alive():
                self._worker.terminate() if first else self._worker.kill()

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                previous[number] = signal.signal(number, receive)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def step(self) -> bool:
        """Do one unit, or wait for what others do; False when nothing is left for this process."""
        self._warn_of_edges()
        waits = False
        for unit in self.units:
            if is_done(self.study, unit) or failure(self.study, unit, self.started) is not None:
                continue
            missing, broken = self._needs(unit)
            if broken is not None:
                record_failure(self.study, unit, broken)
                self.announce(f"{unit.folder}: failed: {broken}")
            elif missing or is_claimed(lock_file(self.study, unit.folder)):
                waits = True
            elif self._do(unit):
                return True
            else:
                waits = True
        if waits:
            self._check_signal()
            time.sleep(_POLL_SECONDS)
        return waits

    def _needs(self, unit: Unit) -> tuple[bool, str | None]:
        """Whether the unit has to wait for others, and why it can't be done where one of those has failed."""
        if unit.method is None:
            return False, None
        needed = []
        if self.study.backbones[unit.backbone].get("scratch") is not None:
            needed.append(Unit(unit.backbone))
        if unit.tried_rate is None:
            needed += [run for run in tuning(self.study) if (run.backbone, run.method) == (unit.backbone, unit.method)]
        for other in needed:
            error = failure(self.study, other, self.started)
            if error is not None and not is_done(self.study, other):
                return False, f"it needs {other.folder}, which failed: {error}"
        if not all(is_done(self.study, other) for other in needed):
            return True, None
        if unit.tried_rate is None and chosen_rate(self.study, unit.backbone, unit.method) is None:
            return False, "no learning rate of its grid trained to the end"
        return False, None

    def _do(self, unit: Unit) -> bool:
        """Do a unit; False where another process is at it."""
        self._check_signal()
        began = time.monotonic()
        progress = UnitProgress(self.study, unit)
        self.inform(f"{self._count()} {unit.folder}: begins")
        outcome, message = work_apart(
            self._order(unit), self._watch, lambda: self._report(unit, progress, time.monotonic() - began)
        )
        self._worker = None
        if outcome == "stopped":
            raise _stopped(self.study, self.received or signal.Signals[message])
        self._check_signal()
        if outcome == "taken":
            return False
        if outcome == "failed":
            if failure(self.study, unit, self.started) is None:
                record_failure(self.study, unit, message)  # the worker could not
            self.announce(f"{unit.folder}: failed: {message}")
        else:
            self._finish(unit, time.monotonic() - began)
        write_record(self.study)
        return True

    def _watch(self, worker: BaseProcess) -> None:
        self._worker = worker
        if self.received is not None:
            worker.terminate()

    def _finish(self, unit: Unit, seconds: float) -> None:
        for other in self.units:
            if (other.backbone, other.method) == (unit.backbone, unit.method):
                prune(self.study, other)
        self._took.append(seconds)
        self.announce(f"{self._count()} {unit.folder}: done in {seconds:.0f} s")

    def _count(self) -> str:
        return f"[{sum(is_done(self.study, unit) for unit in self.units)}/{len(self.units)}]"

    def _report(self, unit: Unit, progress: UnitProgress, seconds: float) -> None:
        """Say how far a unit is, and how long it and the study may take; the study alone in this process."""
        share, reached = progress.read()
        line = f"{self._count()} {unit.folder}: {reached}"
        left = None if share is None else progress.seconds_for(1 - share, share, seconds)
        if left:
            line += f", {rough_time(left)} of training left"
        of_unit = None if share is None else progress.seconds_for(1.0, share, seconds)
        expected = sum(self._took) / len(self._took) if self._took else of_unit
        if expected is not None:
            others = sum(not is_done(self.study, other) for other in self.units) - 1
            line += f", the study {rough_time(max(0.0, expected - seconds) + others * expected)}"
        self.inform(line)

    def _warn_of_edges(self) -> None:
        """Say once of each grid whose best rate is its edge that the best one may lie beyond."""
        for backbone, method in itertools.product(self.study.backbones, self.study.methods):
            edge = None if (backbone, method) in self._warned else edge_of(self.study, backbone, method)
            if edge is not None:
                self._warned.add((backbone, method))
                rate = chosen_rate(self.study, backbone, method)
                self.inform(
                    f"{backbone}, {method}: the best rate, {rate:g}, is the {edge} of its grid, a better one may lie "
                    f"beyond: --widen_rates {self.study.widen_rates + 2} tries further ones"
                )

    def _check_signal(self) -> None:
        if self.received is not None:
            raise _stopped(self.study, self.received)

    def _order(self, unit: Unit) -> Order:
        if unit.method is None:
            return Order(self.study, unit, None)
        recipe = unit_recipe(self.study, unit)
        assert recipe is not None
        if unit.tried_rate is not None:
            return Order(self.study, unit, recipe)
        rate = recipe.trainer["learning_rate"]
        tried = Unit(unit.backbone, unit.method, unit.fold, unit.seed, rate)
        tuned = tried if tried in tuning(self.study) else None
        return Order(self.study, unit, recipe, self._base(unit), tuned)

    def _base(self, unit: Unit) -> dict[str, Any] | None:
        """The study's backbone on the unit's test split, from a cell that has measured it."""
        for other in cells(self.study):
            as_it_is = other.method == unit.method or not self.study.changes_backbone(other.method)
            if as_it_is and (other.backbone, other.fold) == (unit.backbone, unit.fold):
                measured = results(self.study, other)
                if measured is not None:
                    base: dict[str, Any] = measured["test"]["base"]
                    return base
        return None


def _stopped(study: Study, number: signal.Signals) -> RunStoppedError:
    return RunStoppedError(f"stopped by {number.name}; go on with: hycam compare {study.output_dir}", 128 + number)


def unit_recipe(study: Study, unit: Unit) -> Recipe | None:
    """The recipe of a unit that is a run; None while its learning rate or its backbone isn't known yet."""
    assert unit.method is not None
    rate = unit.tried_rate or chosen_rate(study, unit.backbone, unit.method)
    trained = study.backbones[unit.backbone].get("scratch") is not None
    folder = weights(study, unit.backbone) if trained else None
    if rate is None or (trained and folder is None):
        return None
    return study.recipe(
        unit.backbone,
        unit.method,
        fold=unit.fold,
        seed=unit.seed,
        learning_rate=rate,
        folder=unit.folder,
        weights=folder,
    )


def _check_folder(study: Study) -> None:
    """Raise `InputError` where the study's folder holds a run that another recipe made."""
    for unit in [*tuning(study), *cells(study)]:
        path = run_folder(study, unit) / RECIPE_FILE
        if not path.is_file():
            continue
        recipe = unit_recipe(study, unit)
        if recipe is None:
            raise InputError(f"{path.parent}: a run whose learning rate or backbone the study has not yet; {_WAY_OUT}")
        changed = [
            name
            for name in differing_fields(_plain(recipe_values(path)), _plain(recipe.to_dict()))
            if not any(fnmatch(name, free) for free in _FREE)
        ]
        if changed:
            raise InputError(f"{path.parent}: a run that began with other values of {', '.join(changed)}; {_WAY_OUT}")
        if not has_own_split(path.parent):
            raise InputError(f"{path.parent}: a run with other rows held out, {SPLIT_SINCE}; {_WAY_OUT}")
    collect(study)  # which compares the rows


_WAY_OUT = "wanted another output_dir, or that folder deleted"


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """A run's recipe with its backbone by the folder's own name: the study's folder may have been moved."""
    backbone = values["backbone"]
    name = backbone["name_or_path"]
    if name is not None and "/backbones/" in name:
        return values | {"backbone": backbone | {"name_or_path": name.rpartition("/")[2]}}
    return values
