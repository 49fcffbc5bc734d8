"""Where and how a run measures, and peers that take turns. Each adds entries to a record."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from benchmarks.harness.record import Budget, Entry, Record
from benchmarks.harness.timing import Timer, Work, alternate


class Shape(Protocol):
    """A size that is measured: of the op, or of a whole model."""

    def as_dict(self) -> dict[str, Any]: ...


@dataclass
class Session:
    """Where and how a run measures.

    Attributes:
        timers: the first gives the rates that floors are made of; the last times plain calls.
    """

    record: Record
    budget: Budget
    device: torch.device
    timers: Sequence[Timer]
    rounds: int

    def add(self, group: str, shape: Shape | None = None, **fields) -> None:
        self.record.add({"group": group} | ({} if shape is None else {"shape": shape.as_dict()}) | fields)

    def starts(self, seconds: float, group: str, shape: Shape | None = None, **fields) -> bool:
        """Whether the budget has the seconds that the next part needs; where not, the record says so."""
        if self.budget.lasts(seconds):
            return True
        self.add(group, shape, **fields, skipped=f"{self.budget.left:.0f} s were left, {seconds:.0f} s are needed")
        return False


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def time_in_turn(
    session: Session,
    group: str,
    shape: Shape,
    labels: Entry,
    timer: Timer,
    works: Mapping[str, Callable[[], Work]],
) -> None:
    """Add the samples of each peer's work, taken in turn; of one that fails to get ready, the reason."""
    labels = labels | {"method": timer.method}
    samplers = {}
    for name, make in works.items():
        try:
            samplers[name] = timer.prepare(make())
        except Exception as error:  # compilers raise classes of their own; the other peers are still measured
            session.add(group, shape, **labels, peer=name, error=describe(error))
    for name, samples in alternate(samplers, session.rounds, session.budget.lasts).items():
        session.add(group, shape, **labels, peer=name, samples_us=samples)


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]
