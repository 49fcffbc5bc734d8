"""What the record of counts has: the calls that are counted, their launches, and what they are held to."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import triton

from benchmarks.harness.record import Entry
from benchmarks.machine import calls
from benchmarks.machine.builds import describe, identity
from benchmarks.machine.calls import DTYPE, Operation, Use, UseRecorder
from benchmarks.machine.record import SHOWN, TARGET
from benchmarks.machine.turns import BRANCHES, LOOPS, turns
from benchmarks.op.kernels import COSTS
from benchmarks.op.shapes import DECODE, TRAINING, Shape
from hycam_kernels.backends.triton.config_tables import Table, load_table
from hycam_kernels.backends.triton.offline_builds import Launch, one_of_each_configuration, record

# without what tells a build of torch for a CPU from others
VERSIONS = {"triton": triton.__version__, "torch": torch.__version__.partition("+")[0]}


class Call(NamedTuple):
    """A call that is counted: at its shapes, as it runs, with the rows of a table; of some targets, or all."""

    shapes: Sequence[Shape]
    run: Callable[[UseRecorder, Shape], None]
    rows: Callable[[Table], Table] = dict
    targets: tuple[str, ...] | None = None


# other forms of the op than the tables choose are counted where the pages show them
CALLS = {
    "training": Call(TRAINING, calls.training),
    "training, own product": Call(SHOWN, calls.training, calls.own_product, (TARGET,)),
    "training, own product, S not kept": Call(SHOWN, calls.training_without_s, calls.own_product, (TARGET,)),
    "decoding": Call(DECODE, calls.decoding),
    "norm": Call(TRAINING[:3], calls.norm),
}


class Run(NamedTuple):
    """A call as it ran at one shape."""

    call: str
    shape: Shape
    uses: list[Use]
    operations: list[Operation]


def runs(target: str) -> Iterator[Run]:
    """Every call of a target at its shapes."""
    of_target = {name: call for name, call in CALLS.items() if target in (call.targets or (target,))}
    for name, call in of_target.items():
        for shape in call.shapes:
            recorder = UseRecorder(target)
            recorder.table = call.rows(load_table(target))
            with calls.OperationLog() as log:
                call.run(recorder, shape)
            yield Run(name, shape, recorder.uses, log.operations)


def launches(target: str) -> list[Launch]:
    """Every launch of the calls at the shapes: what the record has the builds of."""
    return list(dict.fromkeys(use.launch for run in runs(target) for use in run.uses))


def other_launches(target: str) -> list[Launch]:
    """Of each configuration that ships and that no call at the shapes takes, the launch with the most tensors."""
    taken = {launch.configuration() for launch in launches(target)}
    shipped = one_of_each_configuration(record(target).launches)
    return [launch for launch in shipped if launch.configuration() not in taken]


def call_entries(target: str, builds: Iterable[Entry]) -> list[Entry]:
    """The calls of a target for the record.

    Raises:
        LookupError: one takes a build that isn't there.
        ValueError: a kernel's code has other loops than `turns` knows.
    """
    by_identity = {build["build"]: build for build in builds if build["target"] == target}
    return [
        {
            "target": target,
            "call": run.call,
            "shape": run.shape.as_dict(),
            "launches": [_launch_entry(use, run.shape, by_identity) for use in run.uses],
            "operations": merged(run.operations),
        }
        for run in runs(target)
    ]


def call_differences(before: Iterable[Entry], after: Iterable[Entry]) -> Iterator[str]:
    """One line for each call whose launches or operations aren't what they were."""
    known = {_call_key(entry): entry for entry in before}
    found = {_call_key(entry): entry for entry in after}
    for at in sorted(known.keys() | found.keys()):
        if known.get(at) != found.get(at):
            yield f"{at}: launches or operations differ"


def _call_key(entry: Entry) -> str:
    return f"{entry['target']} {entry['call']} {Shape(**entry['shape'])}"


def _launch_entry(use: Use, shape: Shape, builds: Mapping[str, Entry]) -> Entry:
    name = use.launch.name
    build = identity(name, describe(use.launch))
    if build not in builds:
        raise LookupError(f"{build} isn't counted: count every kernel of the target")
    try:
        branches = BRANCHES[name](use.values) if name in BRANCHES else 1
        executed = turns(LOOPS[name](use.values, use.grid), builds[build]["parts"], branches)
    except ValueError as error:
        raise ValueError(f"{build}: {error}") from error
    cost = COSTS[name](shape, use.values, DTYPE.itemsize)
    return {"kernel": name, "build": build, "programs": use.programs, "turns": executed, **cost._asdict()}


def peer_entries(shapes: Iterable[Shape] = TRAINING) -> list[Entry]:
    """What the kernels are held to: plain PyTorch's operations, and those of torch.compile's graph."""
    # seconds of import, for this alone
    from benchmarks.machine.inductor import inductor_operations

    found = []
    for shape in shapes:
        with calls.OperationLog() as log:
            calls.reference_work(shape, "meta")
        for peer, operations in (("eager", log.operations), ("inductor", inductor_operations(shape))):
            found.append({"peer": peer, "shape": shape.as_dict(), "operations": merged(operations)})
    return found


def merged(operations: Iterable[Operation]) -> list[Entry]:
    """Products one by one; of the others how many there are and what they move together."""
    products, others = [], Counter[str]()
    for operation in operations:
        if operation.flops:
            products.append(operation._asdict() | {"count": 1})
        else:
            others.update(count=1, bytes=operation.bytes)
    rest = [{"name": "others", "flops": 0, "bytes": others["bytes"], "count": others["count"]}] if others else []
    return [*products, *rest]
