"""What a call's time on a CPU consists of: matrix products, native passes, torch's other operations, and the rest.

A sample is three calls, one after the other: a plain one; one under torch's profiler, which sees the operations; one
under Python's, which sees the functions that run the native passes. The rest is what of the plain call is in none of
the parts: Python, autograd and dispatch. Both profilers take a part of a microsecond at each thing that they see, so
small parts come out too large and the rest too small, by no more than the call took longer under torch's.
"""

import time
from collections.abc import Callable, Mapping
from cProfile import Profile
from dataclasses import replace
from types import CodeType

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.record import Entry
from benchmarks.harness.session import Session, Shape, on_threads
from benchmarks.harness.timing import HostTimer, Work, alternate
from hycam_kernels.backends.cpu import passes

PARTS = ("products", "native", "other")
_PRODUCTS = {f"aten::{name}" for name in ("mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot")}


def measure_parts(session: Session, shape: Shape, labels: Entry, works: Mapping[str, Callable[[], Work]]) -> None:
    """Add to the group "profile", of each peer's work in turn on one thread, the time of the call, of its parts, and of
    the whole call under torch's profiler."""
    with on_threads(1):
        samplers = {name: prepare(make()) for name, make in works.items()}
        found = alternate(samplers, session.rounds, session.budget.lasts)
    for name, samples in found.items():
        session.add(
            "profile", shape, **labels, threads=1, method="host", peer=name,
            samples_us=[sample["call"] for sample in samples],
            profiled_us=[sample["profiled"] for sample in samples],
            parts_us={part: [sample[part] for sample in samples] for part in PARTS},
        )  # fmt: skip


def prepare(work: Work) -> Callable[[], dict[str, float]]:
    """A sampler of microseconds by part, and of the "call" and the one that was "profiled"; the first set's."""
    plain = HostTimer(warmup=3).prepare(replace(work, sets=1))
    return lambda: {"call": plain()} | _operations(work) | {"native": _native(work)}


def _operations(work: Work) -> dict[str, float]:
    state = work.setup(0)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        start = time.perf_counter()
        work.run(state)
        profiled = (time.perf_counter() - start) * 1e6
    found = {"profiled": profiled, "products": 0.0, "other": 0.0}
    for event in profiler.events():
        # autograd's events, and the op's own, only enclose operations
        if event.name.startswith("aten::"):
            found["products" if _is_of_product(event) else "other"] += event.self_cpu_time_total
    return found


def _is_of_product(event: FunctionEvent | None) -> bool:
    """Whether an operation is a product, in place or not, or what one runs inside: a copy of an operand."""
    return event is not None and (event.name.removesuffix("_") in _PRODUCTS or _is_of_product(event.cpu_parent))


def _native(work: Work) -> float:
    """The time inside the functions of `passes`, with what they make of their arguments, without torch's operations."""
    state = work.setup(0)
    with Profile() as profiler:
        work.run(state)
    seconds = (
        entry.inlinetime
        for entry in profiler.getstats()
        if isinstance(entry.code, CodeType) and entry.code.co_filename == passes.__file__
    )
    return sum(seconds) * 1e6
