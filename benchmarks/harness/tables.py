"""Tables of records: of the op and of whole models, each from the newest record of a machine that has its group."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.harness.comparison import key, relative_samples
from benchmarks.harness.pages import NOT_MEASURED, markdown
from benchmarks.harness.plots import figures, floor_key, floors_of, link, size
from benchmarks.harness.record import Entry


def load(path: Path) -> Entry:
    return json.loads(path.read_text())


def cpu_folders(results: Path) -> list[Path]:
    return [results / "cpu"]


def gpu_folders(results: Path) -> list[Path]:
    return sorted(
        path for path in results.glob("*") if path.is_dir() and path.name not in ("builds", "cpu", "versions")
    )


def quartiles(samples: Sequence[float]) -> str:
    """Median and quartiles of ratios."""
    low, middle, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def timed(record: Entry, **wanted) -> list[Entry]:
    return [
        entry
        for entry in record["entries"]
        if "samples_us" in entry and all(entry.get(name) == value for name, value in wanted.items())
    ]


def time_ms(entry: Entry) -> str:
    return f"{statistics.median(entry['samples_us']) / 1e3:.1f}"


def of_model(entry: Entry) -> str:
    shape = entry["shape"]
    return f"{shape['model']}, {shape['batch']} x {shape['length']}"


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
    rows = {}  # a peer that took part in several turns was measured in each
    for entry in record["entries"]:
        if entry["group"] == "memory" and "activation_bytes" in entry:
            peak = entry.get("peak_bytes")
            kept = entry["kept_bytes"] / entry["activation_bytes"]
            head = size(entry), entry["dtype"], entry["peer"]
            shown = f"{entry['kept_bytes'] / 1e6:.2f}", f"{kept:.2f}", "" if peak is None else f"{peak / 1e6:.0f}"
            rows[head] = (*head, *shown)
    return markdown(["T, d", "dtype", "peer", "kept, MB", "kept, activations", "peak, MB"], rows.values())


def overhead(record: Entry) -> str:
    rows = [
        [entry["pass"], entry["peer"], f"{statistics.median(entry['samples_us']):.0f}"]
        for entry in timed(record, group="overhead")
    ]
    return markdown(["pass", "peer", "us a call"], rows)


def products(record: Entry) -> str:
    """Forward and backward as multiples of the products alone, round by round, and the time for a token."""
    rows = []
    for entry in timed(record, group="products"):
        same = {name: entry[name] for name in ("shape", "dtype", "threads", "beside")}
        beside = {other["peer"]: other["samples_us"] for other in timed(record, group="products", **same)}
        shape, count = entry["shape"], len(entry["samples_us"])
        cells = [
            quartiles([a / b for a, b in zip(entry["samples_us"], beside[name], strict=False)])
            if name in beside and len(beside[name]) == count and name != entry["peer"] else ""
            for name in ("products", "compile", "compile-max-autotune")
        ]  # fmt: skip
        rows.append(
            [size(entry), f"{shape['rank']}", entry["dtype"], f"{entry['threads']}, {entry['method']}", entry["peer"],
             time_ms(entry), f"{statistics.median(entry['samples_us']) / shape['tokens']:.1f}", *cells]
        )  # fmt: skip
    header = ["T, d", "r", "dtype", "threads, clock", "peer", "ms", "us a token"]
    return markdown([*header, "x products", "x compile", "x max-autotune"], rows)


def parts(record: Entry) -> str:
    """A call, and what it consists of, as multiples of the first peer's call of the same round: products alone, or the
    bare model."""
    rows = []
    for entry in timed(record, group="profile"):
        same = {name: entry[name] for name in ("shape", "dtype", "pass")}
        (first,) = timed(record, group="profile", peer=entry["beside"][0], **same)

        calls = _multiples(entry["samples_us"], first["samples_us"])
        shares = [
            statistics.median(_multiples(entry["parts_us"][part], first["samples_us"]))
            for part in ("products", "native", "other")
        ]
        rest = statistics.median(calls) - sum(shares)
        profiled = statistics.median(_multiples(entry["profiled_us"], entry["samples_us"]))
        rows.append(
            [of_model(entry) if "model" in entry["shape"] else size(entry), entry["dtype"], entry["pass"],
             entry["peer"], quartiles(calls), *(f"{share:.2f}" for share in (*shares, rest, profiled))]
        )  # fmt: skip
    header = ["size", "dtype", "pass", "peer", "call", "products", "native passes", "other operations", "the rest"]
    return markdown([*header, "profiled, x call"], rows)


def _multiples(samples: Sequence[float], of: Sequence[float]) -> list[float]:
    """Round by round."""
    return [own / other for own, other in zip(samples, of, strict=True)]


def in_short(record: Entry) -> str:
    """Forward and backward on one thread against plain PyTorch's time, round by round."""
    peers = {"torch": "this package", "torch-passes": "without its native code", "compile": "torch.compile"}
    rows = []
    for eager in timed(record, group="products", threads=1, peer="eager"):
        cells = []
        for peer in peers:
            same = {name: eager[name] for name in ("shape", "dtype", "threads", "beside")}
            found = timed(record, group="products", peer=peer, **same)
            pairs = zip(found[0]["samples_us"], eager["samples_us"], strict=False) if found else ()
            ratios = [own / other for own, other in pairs]
            cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
        rows.append([size(eager), eager["dtype"], *cells])
    return markdown(["tokens, width", "dtype", *peers.values()], rows)


def shares_of_floor(record: Entry) -> str:
    """Device time by peer, and how many times the floor it is."""
    floors = floors_of(record)
    rows = []
    for group in ("op", "decode"):
        for entry in timed(record, group=group, method="graph"):
            floor, median = floors[floor_key(entry)], statistics.median(entry["samples_us"])
            low, _, high = statistics.quantiles(entry["samples_us"], n=4)
            rows.append(
                [size(entry), entry["pass"], entry["peer"], f"{median:.1f} [{low:.1f}, {high:.1f}]", f"{floor:.1f}",
                 f"{median / floor:.2f}"]
            )  # fmt: skip
    return markdown(["T, d", "pass", "peer", "us [quartiles]", "floor, us", "x floor"], rows)


def kernels(record: Entry) -> str:
    """Each kernel's time alone, its floor by the measured rates, and the share of it that is reached."""
    rows = []
    for entry in timed(record, group="kernel"):
        median = statistics.median(entry["samples_us"])
        rows.append(
            [size(entry), f"`{entry['what']}`", f"{entry['bytes'] / 1e6:.1f}", f"{entry['flops'] / 1e9:.2f}",
             f"{entry['sigmoids'] / 1e6:.1f}", f"{entry['floor_us']:.1f}", f"{median:.1f}",
             f"{entry['floor_us'] / median:.2f}"]
        )  # fmt: skip
    return markdown(["T, d", "kernel", "MB", "GFLOP", "sigmoids, M", "floor, us", "us", "share"], rows)


def attention(record: Entry) -> str:
    """A layer's time beside the bare attention's."""
    kept = {
        (of_model(entry), entry["peer"]): entry["kept_bytes"]
        for entry in record["entries"]
        if entry["group"] == "memory" and entry.get("what") == "attention"
    }
    rows = []
    for entry in timed(record, group="attention"):
        rows.append(
            [of_model(entry), entry["pass"], entry["method"], entry["peer"], time_ms(entry),
             _against(record, entry, "frozen"), f"{kept[of_model(entry), entry['peer']] / 1e6:.2f}"]
        )  # fmt: skip
    return markdown(["shape", "pass", "clock", "method", "ms", "x bare", "kept, MB"], rows)


def steps(record: Entry) -> str:
    """Tokens per second and bytes of a training step by method; without a time, why."""
    memory_of = _memory_of(record, "step")
    rows = []
    for entry in record["entries"]:
        if entry["group"] != "step" or "peer" not in entry:
            continue
        head = _head(entry)
        found = memory_of.get(head)
        if "samples_us" not in entry or found is None:
            rows.append([*head, _no_time(entry), "", "", "", ""])
            continue
        amounts = [f"{found[name] / 1e6:.1f}" for name in ("kept_bytes", "peak_bytes", "optimizer_bytes")]
        rows.append([*head, f"{_tokens_per_second(entry):.0f}", _against(record, entry, "frozen"), *amounts])
    amounts = ["kept, MB", "peak, MB", "optimizer, MB"]
    return markdown(["shape", "dtype", "setting", "method", "tokens/s", "x frozen's time", *amounts], rows)


def targets(record: Entry) -> str:
    """Steps beside the first of the turn, which make the logits of every token: rate and peak; and their own loss."""
    relative, memory_of = relative_samples(record), _memory_of(record, "targets")
    rows = []
    for entry in timed(record, group="targets"):
        head = _head(entry)
        found, cells = memory_of[head], ["", ""]
        if key(entry) in relative:
            first = memory_of[_head(entry | {"peer": entry["beside"][0]})]
            gains = quartiles([found["tokens"] / first["tokens"] / ratio for ratio in relative[key(entry)]])
            cells = [gains, f"{found['peak_bytes'] / first['peak_bytes']:.2f}"]
        rate = 1e6 * found["tokens"] / statistics.median(entry["samples_us"])
        difference = abs(found["loss"] / found["all_logits_loss"] - 1)
        rows.append(
            [*head, entry["method"], f"{found['logits']}", f"{rate:.0f}", f"{found['peak_bytes'] / 1e6:.1f}", *cells,
             f"{difference:.0e}"]
        )  # fmt: skip
    header = ["shape", "dtype", "method", "peer", "clock", "logits of, tokens", "tokens/s", "peak, MB"]
    return markdown([*header, "x tokens/s [quartiles]", "x peak", "loss differs by"], rows)


def _head(entry: Entry) -> tuple[str, str, str, str]:
    return of_model(entry), entry["dtype"], entry["setting"], entry["peer"]


def _memory_of(record: Entry, what: str) -> dict[tuple[str, str, str, str], Entry]:
    entries = (entry for entry in record["entries"] if entry["group"] == "memory" and entry.get("what") == what)
    return {_head(entry): entry for entry in entries}


def _tokens_per_second(entry: Entry) -> float:
    return 1e6 * entry["shape"]["batch"] * entry["shape"]["length"] / statistics.median(entry["samples_us"])


def _no_time(entry: Entry) -> str:
    reason = entry.get("wrong") or entry.get("error") or "not measured"
    return "too little memory" if "OutOfMemory" in reason else "wrong" if "wrong" in entry else reason.split(":")[0]


def generation(record: Entry) -> str:
    """New tokens per second of whole `generate` calls, and the time of one token as a CUDA graph."""
    rows = []
    for entry in timed(record, group="generation"):
        median = statistics.median(entry["samples_us"])
        count = entry["shape"]["batch"] * (int(entry["setting"].split()[0]) if entry["pass"] == "generate" else 1)
        rows.append(
            [of_model(entry), entry["setting"], entry["pass"], entry["peer"], f"{1e6 * count / median:.0f}",
             _against(record, entry, "frozen")]
        )  # fmt: skip
    return markdown(["prompts", "setting", "pass", "method", "tokens/s", "x bare"], rows)


def longest(record: Entry) -> str:
    rows = [
        [entry["shape"]["model"], entry["setting"], entry["peer"], f"{entry['longest_tokens']}", entry["method"]]
        for entry in record["entries"]
        if entry["group"] == "longest" and "longest_tokens" in entry
    ]
    return markdown(["shape", "setting", "method", "tokens", "by"], rows)


def _against(record: Entry, entry: Entry, first: str) -> str:
    """The ratio of the entry's median to that of another peer at the same place."""
    places = ("shape", "dtype", "setting", "pass", "method")
    same = {name: entry.get(name) for name in places}
    others = timed(record, group=entry["group"], peer=first, **same)
    if not others:
        return ""
    return f"{statistics.median(entry['samples_us']) / statistics.median(others[0]['samples_us']):.2f}"


def plots(record: Entry) -> str:
    """The record's figures; `python -m benchmarks.tables` draws them."""
    return "\n\n".join(f"![{name}: share of the floor]({link(record, name)})" for name in figures(record))


Folders = Callable[[Path], list[Path]]
# name -> (folders of records, the groups of which one must be there, how the table is drawn)
TABLES: dict[str, tuple[Folders, tuple[str, ...], Callable[[Entry], str]]] = {
    "cpu-op": (cpu_folders, ("op",), op_ratios),
    "cpu-memory": (cpu_folders, ("op",), memory),
    "cpu-overhead": (cpu_folders, ("overhead",), overhead),
    "cpu-products": (cpu_folders, ("products",), products),
    "cpu-profile": (cpu_folders, ("profile",), parts),
    "cpu-in-short": (cpu_folders, ("products",), in_short),
    "cpu-plots": (cpu_folders, ("sweep",), plots),
    "cpu-attention": (cpu_folders, ("attention",), attention),
    "cpu-steps": (cpu_folders, ("step",), steps),
    "cpu-targets": (cpu_folders, ("targets",), targets),
    "cpu-generation": (cpu_folders, ("generation",), generation),
    "cpu-longest": (cpu_folders, ("longest",), longest),
    "gpu-op": (gpu_folders, ("op",), shares_of_floor),
    "gpu-kernels": (gpu_folders, ("kernel",), kernels),
    "gpu-plots": (gpu_folders, ("sweep",), plots),
    "gpu-memory": (gpu_folders, ("op",), memory),
    "gpu-overhead": (gpu_folders, ("overhead",), overhead),
    "gpu-attention": (gpu_folders, ("attention",), attention),
    "gpu-steps": (gpu_folders, ("step",), steps),
    "gpu-generation": (gpu_folders, ("generation",), generation),
    "gpu-longest": (gpu_folders, ("longest",), longest),
}


def sources(name: str, results: Path) -> list[Path]:
    """The records that a table is drawn from: of each folder the newest with such measurements."""
    folders, groups, _ = TABLES[name]
    found = []
    for folder in folders(results):
        for path in sorted(folder.glob("*.json"), reverse=True):
            if any(
                entry["group"] in groups and ("samples_us" in entry or "longest_tokens" in entry)
                for entry in load(path)["entries"]
            ):
                found.append(path)
                break
    return found


def render(name: str, results: Path) -> str:
    """A table for each record, with the record's name, machine, versions and sources."""
    draw = TABLES[name][2]
    parts = []
    for path in sources(name, results):
        record = load(path)
        parts.append(f"{draw(record)}\n\n{_origin(record, path.relative_to(results))}")
    return "\n\n".join(parts) or NOT_MEASURED


def _origin(record: Entry, name: Path) -> str:
    machine = record["gpu"]["name"] if record["gpu"] else f"{record['cpu']['name']}, {record['cpu']['threads']} threads"
    state = "with uncommitted changes" if record["git"]["dirty"] else "clean"
    commit = record["git"]["commit"]
    sources_ = f"sources {commit[:12]} ({state})" if commit else "sources of no known commit"
    return (
        f"From `benchmarks/results/{name}`: {machine}; torch {record['packages']['torch']}; {sources_}; "
        f"{record['time']}."
    )
