"""Whole models measured by method: attention layers, training steps, generation. Each adds entries to a record.

As in `measure`: a wrong method gets no time, a failing one (too little memory, a package that is missing) is recorded
with its reason, what doesn't fit the time budget is named as skipped. On a CPU the methods of one call take turns; on
CUDA each has the device to itself, since several don't fit its memory.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.harness.memory import kept_bytes, release
from benchmarks.harness.parts import measure_parts
from benchmarks.harness.record import Entry
from benchmarks.harness.session import Session, describe, dtype_name, time_in_turn
from benchmarks.harness.timing import Timer, Work, sets_beyond_cache
from benchmarks.models.backbones import ModelShape
from benchmarks.models.generation import Generation, check_generation
from benchmarks.models.training import PLAIN, AttentionLayer, Setting, TrainingStep, check_attention, check_step
from benchmarks.op.checks import WrongResultError
from benchmarks.op.peers import work
from benchmarks.op.shapes import PASSES

# what is timed of one method: (pass, timer, makes the work)
Timing = tuple[str, Timer, Callable[[], Work]]


def measure_attention(
    session: Session, shape: ModelShape, dtype: torch.dtype, names: Sequence[str], seconds: float = 10.0
) -> None:
    """One attention layer's passes and the bytes that it keeps for the backward."""
    labels = {"dtype": dtype_name(dtype)}

    def make(name: str) -> list[Timing]:
        check_attention(name, shape, dtype, session.device)
        layer = AttentionLayer(name, shape, dtype, session.device)
        first = layer.arguments()
        sets = [first, *(layer.arguments(seed) for seed in range(1, sets_beyond_cache(first, session.device)))]
        kept = kept_bytes(layer.call, first)
        session.add("memory", shape, **labels, what="attention", peer=name, kept_bytes=kept)
        return [(p, timer, partial(work, layer.call, sets, p)) for timer in session.timers for p in PASSES]

    measure_methods(session, "attention", shape, labels, names, make, seconds)


def measure_steps(
    session: Session,
    shape: ModelShape,
    dtype: torch.dtype,
    names: Sequence[str],
    setting: Setting = PLAIN,
    seconds: float = 20.0,
) -> None:
    """A training step's time, and the bytes that it holds, keeps and needs at most."""
    labels = {"dtype": dtype_name(dtype), "setting": str(setting)}

    def make(name: str) -> list[Timing]:
        check_step(name, shape, dtype, session.device, setting)
        step = TrainingStep(name, shape, dtype, session.device, setting)
        found = step.memory() | {"trainable_parameters": step.trainable_parameters}
        session.add("memory", shape, **labels, what="step", peer=name, **found)
        return [("step", session.timers[-1], step.work)]

    measure_methods(session, "step", shape, labels, names, make, seconds)


def measure_generation(
    session: Session,
    shape: ModelShape,
    dtype: torch.dtype,
    names: Sequence[str],
    new_tokens: int,
    seconds: float = 20.0,
) -> None:
    """Whole `generate` calls and, on CUDA, one token's forward as a graph."""
    labels = {"dtype": dtype_name(dtype), "setting": f"{new_tokens} new tokens, {dtype_name(dtype)}"}

    def make(name: str) -> list[Timing]:
        check_generation(name, shape, dtype, session.device)
        generation = Generation(name, shape, dtype, session.device, new_tokens)
        passes: list[Timing] = [("generate", session.timers[-1], generation.work)]
        if session.device.type == "cuda":
            passes.append(("token", session.timers[0], generation.token_work))
        return passes

    measure_methods(session, "generation", shape, labels, names, make, seconds)


def measure_token_profile(
    session: Session, shape: ModelShape, dtype: torch.dtype, names: Sequence[str], seconds: float = 40.0
) -> None:
    """What one token's forward on a static cache consists of, on one thread.

    Args:
        seconds: that the budget must still have: torch's profiler needs one for the events of a deep model's token.
    """
    labels = {"dtype": dtype_name(dtype), "beside": list(names), "pass": "token"}
    if not session.starts(seconds, "profile", shape, **labels):
        return
    works: dict[str, Callable[[], Work]] = {}
    for name in names:
        try:
            check_generation(name, shape, dtype, session.device)
            works[name] = Generation(name, shape, dtype, session.device, new_tokens=1).token_work
        except WrongResultError as error:
            session.add("profile", shape, **labels, peer=name, wrong=str(error))
    measure_parts(session, shape, labels, works)


def measure_methods(
    session: Session,
    group: str,
    shape: ModelShape,
    labels: Entry,
    names: Sequence[str],
    make: Callable[[str], list[Timing]],
    seconds: float,
) -> None:
    """Check and build the methods, then time them: ``make`` does the first and says what there is to time.

    Args:
        seconds: that the budget must still have for a method.
    """
    for beside in [list(names)] if session.device.type == "cpu" else [[name] for name in names]:
        if session.starts(seconds, group, shape, **labels, beside=beside):
            _measure_together(session, group, shape, labels | {"beside": beside}, beside, make)
        # the models are gone with that call's variables: their memory must be free before the next is built
        release(session.device)


def _measure_together(
    session: Session,
    group: str,
    shape: ModelShape,
    labels: Entry,
    names: Sequence[str],
    make: Callable[[str], list[Timing]],
) -> None:
    ready = {}
    for name in names:
        try:
            ready[name] = make(name)
        except WrongResultError as error:
            session.add(group, shape, **labels, peer=name, wrong=str(error))
        except Exception as error:  # packages and allocators raise what they like; the other methods are measured
            session.add(group, shape, **labels, peer=name, error=describe(error))
    for same_pass in zip(*ready.values(), strict=True):
        pass_, timer, _ = same_pass[0]
        works = {name: timing[2] for name, timing in zip(ready, same_pass, strict=True)}
        time_in_turn(session, group, shape, labels | {"pass": pass_}, timer, works)
