"""Tables of `docs/performance.md` from the committed records: ``python -m benchmarks.tables [--check]``.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. Each names the record that it is drawn from: the
newest file, by name, of each folder of ``benchmarks/results`` (``cpu``, or a GPU's name). Without a record it says so.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .compare import key, relative_samples
from .record import ROOT, Entry

PAGE = ROOT / "docs" / "performance.md"
RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "Not measured yet."
_BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def newest(folder: Path) -> Path | None:
    return max(folder.glob("*.json"), default=None) if folder.is_dir() else None


def cpu_records(results: Path) -> list[Path]:
    record = newest(results / "cpu")
    return [] if record is None else [record]


def gpu_records(results: Path) -> list[Path]:
    folders = sorted(path for path in results.glob("*") if path.is_dir() and path.name != "cpu")
    return [record for folder in folders if (record := newest(folder)) is not None]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def quartiles(samples: Sequence[float]) -> str:
    """Median and quartiles of ratios."""
    low, middle, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def size(entry: Entry) -> str:
    return f"{entry['shape']['tokens']}, {entry['shape']['d']}"


def timed(record: Entry, **wanted) -> list[Entry]:
    return [
        entry
        for entry in record["entries"]
        if "samples_us" in entry and all(entry.get(name) == value for name, value in wanted.items())
    ]


def time_ms(entry: Entry) -> str:
    return f"{statistics.median(entry['samples_us']) / 1e3:.1f}"


def op_ratios(record: Entry) -> str:
    """The package's peers against the first of their turn, one row each."""
    relative = relative_samples(record)
    rows = []
    for entry in timed(record, group="op"):
        if key(entry) not in relative:
            continue
        first = entry["beside"][0]
        (beside,) = [other for other in timed(record, peer=first) if key(other) == key(entry | {"peer": first})]
        rows.append(
            [size(entry), entry["dtype"], entry["pass"], entry["peer"], time_ms(entry), f"{first}: {time_ms(beside)}",
             quartiles(relative[key(entry)]), entry["method"]]
        )  # fmt: skip
    return markdown(["T, d", "dtype", "pass", "peer", "ms", "beside, ms", "ratio [quartiles]", "clock"], rows)


def memory(record: Entry) -> str:
    """Kept bytes in activations of [T, d], and the peak where the device's allocator tells it."""
    rows = []
    for entry in record["entries"]:
        if entry["group"] == "memory" and "kept_bytes" in entry:
            peak = entry.get("peak_bytes")
            kept = entry["kept_bytes"] / entry["activation_bytes"]
            rows.append(
                [size(entry), entry["dtype"], entry["peer"], f"{entry['kept_bytes'] / 1e6:.2f}", f"{kept:.2f}",
                 "" if peak is None else f"{peak / 1e6:.0f}"]
            )  # fmt: skip
    return markdown(["T, d", "dtype", "peer", "kept, MB", "kept, activations", "peak, MB"], rows)


def overhead(record: Entry) -> str:
    rows = [
        [entry["pass"], entry["peer"], f"{statistics.median(entry['samples_us']):.0f}"]
        for entry in timed(record, group="overhead")
    ]
    return markdown(["pass", "peer", "us a call"], rows)


def shares_of_floor(record: Entry) -> str:
    """Device time by peer, and how many times the floor it is."""
    floors = {(size(e), e["pass"]): e["floor_us"] for e in record["entries"] if e["group"] == "floor"}
    rows = []
    for group in ("op", "decode"):
        for entry in timed(record, group=group, method="graph"):
            floor, median = floors[size(entry), entry["pass"]], statistics.median(entry["samples_us"])
            low, _, high = statistics.quantiles(entry["samples_us"], n=4)
            rows.append(
                [size(entry), entry["pass"], entry["peer"], f"{median:.1f} [{low:.1f}, {high:.1f}]", f"{floor:.1f}",
                 f"{median / floor:.2f}"]
            )  # fmt: skip
    return markdown(["T, d", "pass", "peer", "us [quartiles]", "floor, us", "x floor"], rows)


Source = Callable[[Path], list[Path]]
TABLES: dict[str, tuple[Source, Callable[[Entry], str]]] = {
    "cpu-op": (cpu_records, op_ratios),
    "cpu-memory": (cpu_records, memory),
    "cpu-overhead": (cpu_records, overhead),
    "gpu-op": (gpu_records, shares_of_floor),
    "gpu-memory": (gpu_records, memory),
    "gpu-overhead": (gpu_records, overhead),
}


def render(name: str, results: Path) -> str:
    """A table for each record of the named kind, with the record's name, machine, versions and sources."""
    source, draw = TABLES[name]
    parts = []
    for path in source(results):
        record = json.loads(path.read_text())
        parts.append(f"{draw(record)}\n\n{_origin(record, path.relative_to(results))}")
    return "\n\n".join(parts) or NOT_MEASURED


def _origin(record: Entry, name: Path) -> str:
    machine = record["gpu"]["name"] if record["gpu"] else f"{record['cpu']['name']}, {record['cpu']['threads']} threads"
    state = "with uncommitted changes" if record["git"]["dirty"] else "clean"
    return (
        f"From `benchmarks/results/{name}`: {machine}; torch {record['packages']['torch']}; sources "
        f"{record['git']['commit'][:12]} ({state}); {record['time']}."
    )


def fill(page: str, results: Path) -> str:
    """The page with every table drawn anew.

    Raises:
        KeyError: a marker names no table.
    """
    return _BLOCK.sub(lambda block: f"{block[1]}{render(block['name'], results)}\n{block[3]}", page)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.split(":")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the page isn't up to date")
    options = parser.parse_args(arguments)
    before = PAGE.read_text()
    after = fill(before, RESULTS)
    if not options.check:
        PAGE.write_text(after)
    elif after != before:
        print(f"{PAGE} isn't what the records say: run `python -m benchmarks.tables`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
