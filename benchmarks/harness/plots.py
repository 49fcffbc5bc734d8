"""Share of the floor against T and d, one figure per pass and one of the kernels, drawn from a record.

`benchmarks.tables` draws them into ``docs/plots``. Each file carries the digest of its record.
"""

import hashlib
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from PIL import Image

from benchmarks.harness.record import Entry

_DIGEST = "Record"
_SIZES = {"tokens": "tokens T", "d": "features d"}
_MARKERS = "osD^vPX*"
_PASSES = {"both": "forward and backward"}


class Point(NamedTuple):
    """One measurement: its share of the floor is 1 where it is as fast as the floor."""

    series: str
    tokens: int
    d: int
    share: float


def size(entry: Entry) -> str:
    return f"{entry['shape']['tokens']}, {entry['shape']['d']}"


def floor_key(entry: Entry) -> tuple[str, str | None, str]:
    return size(entry), entry.get("dtype"), entry["pass"]


def floors_of(record: Entry) -> dict[tuple[str, str | None, str], float]:
    return {floor_key(entry): entry["floor_us"] for entry in record["entries"] if entry["group"] == "floor"}


def figures(record: Entry) -> dict[str, list[Point]]:
    """By name: the passes of the op and decoding (one dtype, the device's own time), and the kernels."""
    floors = floors_of(record)
    on_gpu = record["gpu"] is not None
    found: dict[str, list[Point]] = defaultdict(list)
    for entry in record["entries"]:
        if "samples_us" not in entry:
            continue
        time = statistics.median(entry["samples_us"])
        if entry["group"] == "kernel":
            found["kernels"].append(_point(entry, entry["what"].removesuffix("_kernel"), entry["floor_us"] / time))
        elif entry["group"] in ("op", "sweep", "decode") and floor_key(entry) in floors:
            is_drawn = entry["method"] == "graph" if on_gpu else entry["dtype"] == "float32"
            # the released formulation does other work than the floor counts
            if is_drawn and "released" not in entry["peer"]:
                found[entry["pass"]].append(_point(entry, entry["peer"], floors[floor_key(entry)] / time))
    return dict(found)


def _point(entry: Entry, series: str, share: float) -> Point:
    return Point(series, entry["shape"]["tokens"], entry["shape"]["d"], share)


def redraw(records: Iterable[Path], folder: Path) -> None:
    """Draw every figure of the records into the folder, and remove what is none of theirs."""
    wanted = _wanted(records)
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.png"):
        if path.name not in wanted:
            path.unlink()
    for name, (digest, title, points) in wanted.items():
        _draw(points, title, folder / name, digest)


def outdated(records: Iterable[Path], folder: Path) -> bool:
    """Whether a figure is missing, drawn from other records, or of none."""
    found = {path.name: _digest_in(path) for path in folder.glob("*.png")}
    return found != {name: digest for name, (digest, *_) in _wanted(records).items()}


def link(record: Entry, name: str) -> str:
    """Path of a figure, from the page."""
    return f"plots/{file_name(record, name)}"


def file_name(record: Entry, name: str) -> str:
    machine = record["gpu"]["name"].lower().replace(" ", "-") if record["gpu"] else "cpu"
    return f"{machine}-{name}.png"


def _wanted(records: Iterable[Path]) -> dict[str, tuple[str, str, list[Point]]]:
    wanted = {}
    for path in records:
        text = path.read_bytes()
        record = json.loads(text)
        for name, points in figures(record).items():
            title = f"{_PASSES.get(name, name)}: share of the floor that is reached ({path.parent.name}/{path.name})"
            wanted[file_name(record, name)] = hashlib.sha256(text).hexdigest(), title, points
    return wanted


def _digest_in(path: Path) -> str | None:
    with Image.open(path) as image:
        return image.info.get(_DIGEST)


def _draw(points: Sequence[Point], title: str, path: Path, digest: str) -> None:
    """Against T at the d that has the most of them, and against d at the T that has the most."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    width, length = _most_varied(points, "d", "tokens"), _most_varied(points, "tokens", "d")
    # markers too: curves that run together, and sizes at which a peer was measured alone
    looks = {
        series: {"color": f"C{index % 10}", "marker": _MARKERS[index % len(_MARKERS)]}
        for index, series in enumerate(dict.fromkeys(point.series for point in points))
    }
    drawn = {}
    for axis, along, fixed, value in ((axes[0], "tokens", "d", width), (axes[1], "d", "tokens", length)):
        chosen = [point for point in points if getattr(point, fixed) == value]
        for series in dict.fromkeys(point.series for point in chosen):
            # of a peer that was timed in several turns, the mean
            shares: dict[int, list[float]] = defaultdict(list)
            for point in chosen:
                if point.series == series:
                    shares[getattr(point, along)].append(point.share)
            positions = sorted(shares)
            drawn[series] = axis.plot(positions, [statistics.mean(shares[x]) for x in positions], **looks[series])[0]
        sizes = sorted({getattr(point, along) for point in chosen})
        axis.set_xscale("log")
        axis.set_xticks(sizes, [f"{x:,}" for x in sizes])
        axis.minorticks_off()
        axis.set_xlabel(f"{_SIZES[along]} (with {_SIZES[fixed]} = {value:,})")
        axis.grid(alpha=0.3)
    highest = max(max(line.get_ydata()) for axis in axes for line in axis.lines)
    axes[0].set_ylim(0, 1.08 * highest)  # both panels', with room for whole markers
    axes[0].set_ylabel("floor's time / measured time\n(1: as fast as the floor)")
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=6, fontsize="small")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=110, metadata={_DIGEST: digest, "Software": None})
    plt.close(figure)


def _most_varied(points: Sequence[Point], fixed: str, along: str) -> int:
    """The value of one size at which the other takes the most values."""
    seen: dict[int, set[int]] = defaultdict(set)
    for point in points:
        seen[getattr(point, fixed)].add(getattr(point, along))
    return max(seen, key=lambda value: (len(seen[value]), value))
