"""What a run measures: the machine's rates, the op's passes by peer, memory, overhead. Each adds entries to a record.

A peer whose result is wrong is not timed, and the record says so. What doesn't fit the time budget is skipped, and the
record says that too. Peers of one call take turns, so that their ratios are of one moment.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.memory import kept_bytes
from benchmarks.harness.record import Entry
from benchmarks.harness.session import Session, describe, dtype_name, time_in_turn
from benchmarks.harness.timing import HostTimer, Timer, Work, alternate, sets_beyond_cache
from benchmarks.op.checks import Oracle, WrongResultError
from benchmarks.op.peers import Arguments, Outputs, Peer, leaves, make_arguments, peer, upstream, work
from benchmarks.op.shapes import PASSES, Shape, decode_traffic, floor_us, flops, traffic

# calls on an idle device, none waited for
QUEUED = 20


def measure_op(
    session: Session,
    shape: Shape,
    dtype: torch.dtype,
    names: Sequence[str],
    *,
    passes: Sequence[str] = PASSES,
    group: str = "op",
    seconds: float = 5.0,
) -> None:
    """Check the peers, then measure the memory of a training step (of the group "op") and time them in turn.

    Args:
        names: of peers, all of one variant.
        passes: of `shapes.PASSES`, or ``("inference",)``: without noise and without gradients.
        seconds: that the budget must still have.
    """
    labels = {"dtype": dtype_name(dtype), "beside": list(names)}
    if not session.starts(seconds, group, shape, **labels):
        return
    peers = _build(session, shape, labels, names, group)
    if not peers:
        return
    variant = peers[0].variant
    inference = "inference" in passes

    def make(seed: int) -> Arguments:
        return make_arguments(shape, dtype, session.device, variant, seed, noise=not inference)

    first = make(0)
    sets = [first, *(make(seed) for seed in range(1, sets_beyond_cache(first, session.device)))]
    peers = _right_ones(session, shape, labels, peers, Oracle(first, variant, inference=inference), group)
    if group == "op":
        _measure_memory(session, shape, dtype, peers, first)
    for timer in session.timers:
        for pass_ in passes:
            time_in_turn(
                session, group, shape, labels | {"pass": pass_}, timer,
                {candidate.name: partial(work, candidate.call, sets, pass_) for candidate in peers},
            )  # fmt: skip


def _build(session: Session, shape: Shape, labels: Entry, names: Sequence[str], group: str) -> list[Peer]:
    peers = []
    for name in names:
        try:
            peers.append(peer(name))
        except RuntimeError as error:
            session.add(group, shape, **labels, peer=name, error=describe(error))
    return peers


def _right_ones(
    session: Session, shape: Shape, labels: Entry, peers: Sequence[Peer], oracle: Oracle, group: str
) -> list[Peer]:
    """The peers whose results are right; what is wrong with the others goes to the record."""
    right = []
    for candidate in peers:
        try:
            oracle.check(candidate)
            right.append(candidate)
        except WrongResultError as error:
            session.add(group, shape, **labels, peer=candidate.name, wrong=str(error))
        except Exception as error:  # as below
            session.add(group, shape, **labels, peer=candidate.name, error=describe(error))
    return right


def _measure_memory(
    session: Session, shape: Shape, dtype: torch.dtype, peers: Sequence[Peer], arguments: Arguments
) -> None:
    """Bytes kept for the backward and, on CUDA, the peak of a forward and backward."""
    for candidate in peers:
        labels = {"dtype": dtype_name(dtype), "peer": candidate.name}
        try:
            kept = kept_bytes(candidate.call, arguments)
            peak = peak_bytes(candidate.call, arguments) if session.device.type == "cuda" else None
        except Exception as error:  # as in timing: one peer's failure is recorded, the others are measured
            session.add("memory", shape, **labels, error=describe(error))
            continue
        activation = arguments["hidden"].nbytes
        session.add("memory", shape, **labels, kept_bytes=kept, peak_bytes=peak, activation_bytes=activation)


def peak_bytes(call: Callable[[Arguments], Outputs], arguments: Arguments) -> int:
    """Most that a forward and backward allocate on the CUDA device beyond what was there before, gradients included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = call(arguments)
    grads = torch.autograd.grad(outputs, leaves(arguments), upstream(outputs))
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del grads
    return peak


def measure_rates(session: Session, dtype: torch.dtype, shapes: Sequence[Shape], copy_bytes: int) -> None:
    """The library's rate on each shape's [T, d] x [d, d] product and the bandwidth of a large copy, then the floors."""
    timer = session.timers[0]
    bandwidth = _rate(session, timer, _copy(copy_bytes, session.device), 2 * copy_bytes, "copy")
    for shape in shapes:
        if not session.starts(1, "rate", shape):
            return

        def draw(rows: int, d: int = shape.d) -> Tensor:
            return torch.randn(rows, d, device=session.device).to(dtype)

        pairs = [(draw(shape.tokens), draw(shape.d)) for _ in range(3)]
        rate = _rate(session, timer, _product(pairs), 2 * shape.tokens * shape.d**2, "product", shape, dtype)
        for pass_ in PASSES:
            amounts = flops(shape, pass_), traffic(shape, pass_, dtype.itemsize)
            session.add(
                "floor", shape, dtype=dtype_name(dtype), **{"pass": pass_}, flops=amounts[0], bytes=amounts[1],
                floor_us=floor_us(*amounts, rate, bandwidth),
            )  # fmt: skip


def _copy(size: int, device: torch.device) -> Work:
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return Work(lambda i: i, lambda i: target.copy_(source), 1)


def _product(pairs: list[tuple[Tensor, Tensor]]) -> Work:
    return Work(lambda i: pairs[i], lambda pair: torch.mm(pair[0], pair[1].T), len(pairs))


def measure_decode_floors(session: Session, dtype: torch.dtype, shapes: Sequence[Shape]) -> None:
    """Time that reading an inference step's weights takes at the bandwidth of the record's copy."""
    copy = next(entry for entry in session.record.entries if entry.get("what") == "copy")
    for shape in shapes:
        amount = decode_traffic(shape, dtype.itemsize)
        session.add(
            "floor", shape, dtype=dtype_name(dtype), **{"pass": "inference"}, bytes=amount,
            floor_us=1e6 * amount / copy["per_second"],
        )  # fmt: skip


def _rate(
    session: Session,
    timer: Timer,
    work_: Work,
    amount: int,
    what: str,
    shape: Shape | None = None,
    dtype: torch.dtype | None = None,
) -> float:
    samples = alternate({what: timer.prepare(work_)}, session.rounds, session.budget.lasts)[what]
    per_second = 1e6 * amount / statistics.median(samples)
    labels = {} if dtype is None else {"dtype": dtype_name(dtype)}
    session.add(
        "rate", shape, what=what, **labels, method=timer.method, amount=amount, per_second=per_second,
        samples_us=samples,
    )  # fmt: skip
    return per_second


def measure_overhead(
    session: Session, shape: Shape, dtype: torch.dtype, names: Sequence[str], queued: int = QUEUED
) -> None:
    """The host's time for one call on tensors so small that a device only waits: per call over the queued ones."""
    if not session.starts(5, "overhead", shape):
        return
    timer = HostTimer(warmup=3)
    for pass_ in ("inference", "forward", "both"):
        samplers = {}
        for name in names:
            candidate = peer(name)
            sets = [make_arguments(shape, dtype, session.device, candidate.variant, noise=pass_ != "inference")]
            try:
                samplers[name] = timer.prepare(_queued(work(candidate.call, sets, pass_), session.device, queued))
            except Exception as error:  # as in timing
                session.add("overhead", shape, **{"pass": pass_}, peer=name, error=describe(error))
        for name, samples in alternate(samplers, session.rounds, session.budget.lasts).items():
            per_call = [sample / queued for sample in samples]
            session.add(
                "overhead", shape, dtype=dtype_name(dtype), **{"pass": pass_}, peer=name, method="host",
                samples_us=per_call,
            )  # fmt: skip


def _queued(one: Work, device: torch.device, count: int) -> Work:
    """Several calls on an idle device, none waited for."""

    def setup(index: int):
        if device.type == "cuda":
            torch.cuda.synchronize()
        return one.setup(index)

    def run(state) -> None:
        for _ in range(count):
            one.run(state)

    return Work(setup, run, one.sets)
