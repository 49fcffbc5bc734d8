"""Ratios of two records, with the 95 % intervals that their samples leave (bootstrap)."""

import json
import random
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.harness.record import Entry

OURS = {"torch", "fused"}
_RESAMPLES = 1000
_LABELS = ("group", "shape", "dtype", "setting", "pass", "method", "peer", "what", "beside")
# amounts without samples, and whether more of one is worse
_AMOUNTS = {"kept_bytes": True, "peak_bytes": True, "longest_tokens": False}


class Incomparable(ValueError):  # noqa: N818 (what the records are, not what failed)
    """Two records of different machines, or nothing that both measured."""


class Ratio(NamedTuple):
    """new / old of one quantity (old / new where more is better), with the ends of its interval."""

    label: str
    ours: bool
    value: float
    low: float
    high: float

    def regressed(self, threshold: float) -> bool:
        return self.ours and self.low > 1 + threshold


def key(entry: Entry) -> str:
    return json.dumps([entry.get(label) for label in _LABELS])


def label(entry: Entry) -> str:
    shape = entry.get("shape") or {}
    parts = [entry["group"], *(f"{name}={value}" for name, value in shape.items())]
    return " ".join(str(part) for part in [*parts, *(entry.get(name) for name in _LABELS[2:-1])] if part)


def is_ours(entry: Entry) -> bool:
    return not OURS.isdisjoint(str(entry.get("peer", "")).split("-"))


def medians_ratio(old: Sequence[float], new: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of medians, and its 2.5 and 97.5 percentiles over resampled samples."""
    draw = random.Random(0)
    ratios = sorted(
        statistics.median(draw.choices(new, k=len(new))) / statistics.median(draw.choices(old, k=len(old)))
        for _ in range(_RESAMPLES)
    )
    low, high = ratios[round(0.025 * _RESAMPLES)], ratios[round(0.975 * _RESAMPLES) - 1]
    return statistics.median(new) / statistics.median(old), low, high


def relative_samples(record: Entry) -> dict[str, list[float]]:
    """By key: samples of peers, each divided by the sample of the same turn of the first peer beside it."""
    timed = {key(entry): entry for entry in record["entries"] if "samples_us" in entry}
    relative = {}
    for entry in timed.values():
        if not entry.get("beside") or entry["peer"] == entry["beside"][0]:
            continue
        first = timed.get(key(entry | {"peer": entry["beside"][0]}))
        if first is not None:
            pairs = zip(entry["samples_us"], first["samples_us"], strict=True)
            relative[key(entry)] = [own / other for own, other in pairs]
    return relative


def absolute_samples(record: Entry) -> dict[str, list[float]]:
    return {key(entry): entry["samples_us"] for entry in record["entries"] if "samples_us" in entry}


def machine(record: Entry) -> list[str | None]:
    return [record["cpu"]["name"], (record["gpu"] or {}).get("name")]


def compare(old: Entry, new: Entry, *, relative: bool = False) -> tuple[list[Ratio], list[str]]:
    """Ratios of what both records have, and labels of the package's peers that have no result any more.

    Raises:
        Incomparable: they are of different machines, or have nothing in common.
    """
    if machine(old) != machine(new):
        raise Incomparable(f"the records are of different machines: {machine(old)} and {machine(new)}")
    samples_of = relative_samples if relative else absolute_samples
    before, after = samples_of(old), samples_of(new)
    by_key = {key(entry): entry for entry in old["entries"]}
    ratios = [
        Ratio(label(by_key[name]), is_ours(by_key[name]), *medians_ratio(samples, after[name]))
        for name, samples in before.items()
        if name in after
    ]
    ratios += _amount_ratios(old, new)
    if not ratios:
        raise Incomparable("the records have no measurement in common")
    return ratios, _lost(old, new)


def _amount_ratios(old: Entry, new: Entry) -> list[Ratio]:
    after = {key(entry): entry for entry in new["entries"]}
    ratios = []
    for entry in old["entries"]:
        other = after.get(key(entry), {})
        for name, more_is_worse in _AMOUNTS.items():
            if entry.get(name) and other.get(name) is not None:
                value = other[name] / entry[name] if more_is_worse else entry[name] / max(other[name], 1)
                ratios.append(Ratio(f"{label(entry)} {name}", is_ours(entry), value, value, value))
    return ratios


def _lost(old: Entry, new: Entry) -> list[str]:
    """Own peers that had times and now are wrong or fail; what only ran out of time isn't lost."""
    broken = {
        json.dumps([entry["group"], entry.get("shape"), entry.get("setting"), entry["peer"]])
        for entry in new["entries"]
        if "peer" in entry and ("wrong" in entry or "error" in entry)
    }
    return sorted(
        label(entry)
        for entry in old["entries"]
        if "samples_us" in entry
        and is_ours(entry)
        and json.dumps([entry["group"], entry.get("shape"), entry.get("setting"), entry["peer"]]) in broken
    )
