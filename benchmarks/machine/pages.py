"""Tables of the record of counts. All times in them are least times on paper; none was measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.harness.pages import markdown
from benchmarks.harness.record import Entry
from benchmarks.machine.assumptions import GPUS, Gpu
from benchmarks.machine.bounds import PIPES, Bound, clocks, launch_bound, operation_us, resident
from benchmarks.machine.record import SHOWN, TARGET, load
from benchmarks.op.shapes import DECODE, TRAINING, Shape, floor_us, flops, traffic

# a call, the kernels of it that are shown (None: all), and what is said of them
Form = tuple[str, tuple[str, ...] | None, str]
# what a training call launches, then what only its other forms do
_FORMS: tuple[Form, ...] = (
    ("training", None, ""),
    ("training, own product", ("product_forward_kernel",), ", S kept"),
    ("training, own product, S not kept", ("product_forward_kernel",), ", S not kept"),
)
_PEERS = {"eager": "plain PyTorch", "inductor": "torch.compile"}
Row = tuple[str, Entry, Entry]  # a kernel as it is called here, its launch, its build


def draw(name: str, path: Path) -> str:
    """A table of the record at this path, with where it comes from."""
    record = load(path)
    versions = f"triton {record['triton']}, torch {record['torch']}"
    return f"{TABLES[name](record)}\n\nBy count, on paper, from `benchmarks/results/{path.name}`: {versions}."


def build_lines(build: Entry) -> Iterator[str]:
    """A build's registers and memory, then each part of its code: on NVIDIA in clocks of a multiprocessor."""
    gpu = GPUS.get(build["target"])
    held = f", {_held(build, gpu)} a multiprocessor" if gpu else ""
    yield (
        f"{build['target']} {build['kernel']} {build['config']}: {build['registers']} registers, "
        f"{build['spill_bytes']} spilled, {build['shared_bytes']} bytes of shared memory{held}"
    )
    for index, part in enumerate(build["parts"]):
        place = f"a turn of loop {index}" if index else "outside loops"
        amounts = clocks(part["counts"], gpu) | {"bytes": part["counts"].get("global", 0)} if gpu else part["counts"]
        yield f"    {place}: " + ", ".join(f"{name} {number:.0f}" for name, number in amounts.items())


def loops(record: Entry) -> str:
    """The kernels' loops, and what stands outside them; without those of our own product, one a strip."""
    gpu = GPUS[TARGET]
    rows = []
    shown = {build["build"]: (name, build) for name, _, build in _kernels(record, TARGET, SHOWN[0], _FORMS[:1])}
    for name, build in shown.values():
        held = str(_held(build, gpu))
        for index, part in enumerate(build["parts"]):
            found = clocks(part["counts"], gpu)
            place = f"a turn of loop {index}" if index else "outside loops"
            cells = [_bold(f"{number:.0f}", number == max(found.values())) for number in found.values()]
            moved = f"{part['counts'].get('global', 0) / 1024:.1f}"
            rows.append([f"`{name}`", place, *cells, moved, f"{build['registers']}", held])
    header = ["kernel", "part", *clocks({}, gpu), "KiB asked of L2", "registers", "programs a multiprocessor"]
    return markdown(header, rows)


def resources(record: Entry) -> str:
    """What the compiler made of each kernel on every target that has calls."""
    found = {
        target: {build["kernel"]: _resources(build) for _, _, build in _kernels(record, target, SHOWN[0])}
        for target in GPUS
    }
    names = dict.fromkeys(name for made in found.values() for name in made)
    rows = [[f"`{name}`", *(made.get(name, "—") for made in found.values())] for name in names]
    return markdown(["kernel", *found], rows)


def kernels(record: Entry, target: str = TARGET) -> str:
    """Each kernel's least time by pipe at the training shapes of d = 4096."""
    return _bounds(GPUS[target], {shape: _kernels(record, target, shape) for shape in SHOWN})


def decoding(record: Entry) -> str:
    return _bounds(GPUS[TARGET], {shape: _launches(record, TARGET, "decoding", shape) for shape in DECODE})


def norm(record: Entry) -> str:
    return _bounds(GPUS[TARGET], {shape: _launches(record, TARGET, "norm", shape) for shape in TRAINING[:3]})


def calls(record: Entry) -> str:
    """Forward and backward with every gradient, beside the floor and what the op is held to."""
    gpu = GPUS[TARGET]
    peers = {(entry["peer"], Shape(**entry["shape"])): entry["operations"] for entry in record["peers"]}
    rows = []
    for shape in TRAINING:
        call = _call(record, TARGET, "training", shape)
        floor, whole = _floor(shape, gpu), _call_us(record, call, gpu)
        products = sum(operation_us(one, gpu) for one in call["operations"] if one["flops"])
        in_kernels = sum(bound.time for _, bound in _bounds_of(record, call, gpu))
        number = len(call["launches"]) + sum(one["count"] for one in call["operations"])
        cells = [f"{products:.0f}", f"{in_kernels:.0f}", f"{whole - products - in_kernels:.0f}", f"{whole:.0f}"]
        cells += [f"{number}", f"{floor:.0f}", f"{whole / floor:.2f}"]
        for peer in _PEERS:
            operations = peers[peer, shape]
            time = sum(operation_us(one, gpu) for one in operations)
            moved = sum(one["bytes"] for one in operations)
            number = sum(one["count"] for one in operations)
            cells.append(f"{time:.0f} ({moved / 1e6:.0f} MB, {number} launches): {time / whole:.2f} x")
        rows.append([f"{shape.tokens}, {shape.d}", *cells])
    header = ["T, d", "products", "kernels", "others", "sum, us", "launches", "floor, us", "sum / floor"]
    return markdown([*header, *_PEERS.values()], rows)


def targets(record: Entry) -> str:
    """The whole call on every target, and what bounds its large kernels."""
    rows = []
    for target, gpu in GPUS.items():
        for shape in SHOWN:
            call = _call(record, target, "training", shape)
            found = sorted(_bounds_of(record, call, gpu), key=lambda item: -item[1].time)
            large = ", ".join(f"`{name}` {bound.time:.0f} ({bound.pipe})" for name, bound in found[:4])
            whole, floor = _call_us(record, call, gpu), _floor(shape, gpu)
            cells = [f"{whole:.0f}", f"{floor:.0f}", f"{whole / floor:.2f}", large]
            rows.append([target, gpu.name, f"{shape.tokens}, {shape.d}", *cells])
    return markdown(["target", "as", "T, d", "sum, us", "floor, us", "sum / floor", "the largest kernels, us"], rows)


TABLES: dict[str, Callable[[Entry], str]] = {
    "counts-resources": resources,
    "counts-loops": loops,
    "counts-kernels": kernels,
    "counts-calls": calls,
    "counts-targets": targets,
    "counts-decoding": decoding,
    "counts-norm": norm,
}


def _resources(build: Entry) -> str:
    """Registers of a thread, KiB of shared memory, matrix instruction."""
    multiplies = {name for part in build["parts"] for name in part["counts"]} & {"HMMA", "HGMMA", "UTCHMMA"}
    return ", ".join([f"{build['registers']}", f"{build['shared_bytes'] / 1024:.0f} KB", *sorted(multiplies)])


def _bounds(gpu: Gpu, launches_of: Mapping[Shape, Sequence[Row]]) -> str:
    rows = []
    for shape, launches in launches_of.items():
        for name, launch, build in launches:
            bound = launch_bound(build, launch, gpu)
            cells = [_bold(f"{bound.us[pipe]:.1f}", pipe == bound.pipe) for pipe in PIPES]
            grid = [f"{launch['programs']}", f"{bound.waves:.2f}"]
            rows.append([f"`{name}`", f"{shape.tokens}, {shape.d}", *grid, *cells])
    return markdown(["kernel", "T, d", "programs", "waves", *(f"{pipe}, us" for pipe in PIPES)], rows)


def _kernels(record: Entry, target: str, shape: Shape, forms: Sequence[Form] = _FORMS) -> list[Row]:
    found = []
    forms = forms if target == TARGET else forms[:1]
    for call, wanted, form in forms:
        for name, launch, build in _launches(record, target, call, shape):
            if wanted is None or name in wanted:
                found.append((name + form, launch, build))
    return found


def _launches(record: Entry, target: str, call: str, shape: Shape) -> list[Row]:
    builds = {build["build"]: build for build in record["builds"] if build["target"] == target}
    found = _call(record, target, call, shape)["launches"]
    return [(launch["kernel"], launch, builds[launch["build"]]) for launch in found]


def _call(record: Entry, target: str, call: str, shape: Shape) -> Entry:
    (found,) = [
        entry
        for entry in record["calls"]
        if (entry["target"], entry["call"], entry["shape"]) == (target, call, shape.as_dict())
    ]
    return found


def _bounds_of(record: Entry, call: Entry, gpu: Gpu) -> list[tuple[str, Bound]]:
    rows = _launches(record, call["target"], call["call"], Shape(**call["shape"]))
    return [(name, launch_bound(build, launch, gpu)) for name, launch, build in rows]


def _call_us(record: Entry, call: Entry, gpu: Gpu) -> float:
    of_kernels = sum(bound.time for _, bound in _bounds_of(record, call, gpu))
    return of_kernels + sum(operation_us(one, gpu) for one in call["operations"])


def _floor(shape: Shape, gpu: Gpu) -> float:
    return floor_us(flops(shape, "both"), traffic(shape, "both"), gpu.flops_per_s, gpu.bytes_per_s)


def _held(build: Entry, gpu: Gpu) -> int:
    return resident(build["registers"], build["shared_bytes"], build["warps"], gpu)


def _bold(text: str, largest: bool) -> str:
    return f"**{text}**" if largest else text
