"""The table of block sizes that measured candidates make."""

import json
import statistics
from collections.abc import Sequence

import torch

from .config_tables import Config, Table, is_candidate, launch_parameters, select, with_candidates
from .tuning import LEFT_OUT, Measurement, Size

# a candidate must be this much faster than the shipped row to replace it
WORTHWHILE = 0.99


def winners(found: Sequence[Measurement], table: Table) -> Table:
    """The table with the best row of each kernel, by range of tokens, before its present rows.

    Ranges end at the power of two after each measured number of tokens; the largest has no end. Within a range the row
    with the smallest geometric mean of times wins. Winning rows take 16-bit floats, ranks up to the largest measured,
    and what else the present row is limited to; earlier rows of the same limits go. An optional kernel that is better
    left out over all sizes loses all its rows but candidates.
    """
    tuned = {kernel: list(rows) for kernel, rows in table.items()}
    for kernel in dict.fromkeys(m.kernel for m in found):
        measured = [m for m in found if m.kernel == kernel]
        if _best(measured, table) == LEFT_OUT:
            tuned[kernel] = [row for row in tuned[kernel] if is_candidate(row)]
            if not tuned[kernel]:
                del tuned[kernel]
            continue
        measured = [m for m in measured if m.row != LEFT_OUT]
        tokens = sorted({m.size.tokens for m in measured})
        rows: list[Config] = []
        for index, count in enumerate(tokens):
            of_range = [m for m in measured if m.size.tokens == count]
            best = _best(of_range, table)
            if best is None:
                continue
            limits: Config = {"dtypes": ["bfloat16", "float16"]}
            limits |= _limits(_present(with_candidates(table), of_range[0]))
            limits["max_rank"] = min(limits.get("max_rank", 1 << 30), max(m.size.rank for m in measured))
            if best.keys() & {"PROGRAMS", "EXPERTS"}:
                # experts that are held together take shared memory or registers each, and so does what isn't measured
                limits |= {"max_experts": max(m.size.num_experts for m in measured), "plain": True}
                limits["min_rank"] = max(limits.get("min_rank", 1), 1)
            limits.pop("max_tokens", None)
            if index + 1 < len(tokens):
                limits["max_tokens"] = 1 << (count - 1).bit_length()
            rows.append(limits | best)
        rows = _merge_equal(rows)
        taken = [_limits(row) for row in rows]
        tuned[kernel] = rows + [row for row in tuned[kernel] if _limits(row) not in taken]
    return tuned


def _present(table: Table, m: Measurement) -> Config:
    """The row that the table has for a measurement's kernel and size, its limits included."""
    index = select(table, m.kernel, torch.bfloat16, *m.size, kept=m.pass_ in ("forward", "backward"))
    return {} if index is None else table[m.kernel][index]


def _best(measured: list[Measurement], table: Table) -> Config | None:
    """The fastest row over all the sizes; the present one of the first size, unless another is worth the change."""
    sizes = list(dict.fromkeys(m.size for m in measured))
    times: dict[str, dict[Size, float]] = {}
    for m in measured:
        if m.median_us is not None:
            times.setdefault(json.dumps(m.row), {})[m.size] = m.median_us
    means = {
        row: statistics.geometric_mean(by_size.values()) for row, by_size in times.items() if len(by_size) == len(sizes)
    }
    if not means:
        return None
    fastest = min(means, key=means.__getitem__)
    present = json.dumps(launch_parameters(_present(table, measured[0])))
    return json.loads(present if means[fastest] >= WORTHWHILE * means.get(present, float("inf")) else fastest)


def _merge_equal(rows: list[Config]) -> list[Config]:
    """Neighbouring ranges with equal parameters become one."""
    merged: list[Config] = []
    for row in rows:
        if merged and launch_parameters(merged[-1]) == launch_parameters(row):
            merged.pop()
        merged.append(row)
    return merged


def _limits(row: Config) -> Config:
    parameters = launch_parameters(row)
    return {key: value for key, value in row.items() if key not in parameters}


def table_text(table: Table) -> str:
    """JSON as the shipped tables are written: one row a line."""
    kernels = []
    for kernel, rows in table.items():
        lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
        kernels.append(f"  {json.dumps(kernel)}: [\n{lines}\n  ]")
    return "{\n" + ",\n".join(kernels) + "\n}\n"
