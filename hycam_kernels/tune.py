"""Opt-in tuner: measures block sizes on the GPU at hand and writes a table of one's own.

``python -m hycam_kernels.tune --out FOLDER [--tokens 2400 8192] [--dim 4096] [--experts 5] [--rank 64]``

The table is used by processes that have ``HYCAM_KERNELS_TABLES=FOLDER`` in their environment. Candidates of a kernel
are the rows that the present table picks at the measured sizes and their neighbours, one number changed. A candidate is
timed as part of the whole pass, as a CUDA graph; one that spills registers, fails to compile, or changes the pass's
results by more than a rounding can't win. Where a table may leave a kernel out, so that others do its work, leaving it
out is a candidate too; where it names one as a candidate, using it is.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import triton_backend
from .inputs import DIFFERENTIABLE, ModulationInputs, NormProjectInputs
from .kernels.decode import decode_forward
from .kernels.launch import Launcher
from .kernels.tables import OPTIONAL, Config, Table, family_of, launch_parameters, load_table, select, with_candidates
from .modulation import _prepare

# a candidate must be this much faster than the shipped row to replace it
WORTHWHILE = 0.99
# relative difference of bfloat16 results that another order of summation explains
ROUNDING = 2**-7
DECODE_TOKENS = triton_backend.MAX_DECODE_TOKENS
NOT_KEPT = "forward, S not kept"
_WHOLE_NUMBERS = {
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4),
    "SPLITS": (1, 2, 3, 4, 6, 8),
    "GROUP": (1, 4, 8, 16),
}
_BLOCKS = (16, 32, 64, 128, 256)
# stands for the row of an optional kernel that a table leaves out
LEFT_OUT: Config = {}


class Size(NamedTuple):
    tokens: int
    d: int
    num_experts: int
    rank: int


@dataclass
class Measurement:
    """One candidate row of one kernel at one size: the whole pass's time, or why it can't win."""

    kernel: str
    pass_: str
    size: Size
    row: Config
    median_us: float | None = None
    refusal: str | None = None


class RowLauncher(Launcher):
    """A launcher whose table can be replaced, and which notes the kernels it was asked for and those that spill."""

    def __init__(self, table: Table, *, inline_assembly: bool = True) -> None:
        self.table = table
        self.inline_assembly = inline_assembly
        self.has_tf32 = inline_assembly
        self.asked: dict[str, Config] = {}
        self.spills: dict[str, int] = {}

    def config(self, kernel: str, x: ModulationInputs | NormProjectInputs) -> Config:
        config = super().config(kernel, x)
        index = self.row(kernel, x)
        assert index is not None
        self.asked[kernel] = launch_parameters(self.table[kernel][index])
        return config

    def __call__(self, kernel, grid, config, **arguments) -> None:
        compiled = kernel[grid](**arguments, **config)
        self.spills[kernel.__name__] = getattr(compiled, "n_spills", 0)


class WarmUpLauncher(RowLauncher):
    """Compiles without launching."""

    def __call__(self, kernel, grid, config, **arguments) -> None:
        kernel.warmup(grid=grid, **arguments, **config)


def neighbours(row: Config) -> Iterator[Config]:
    """Rows with one number changed to the next smaller or larger of its choices, or one switch turned.

    BLOCK_R stays, it covers the rank.
    """
    for name, value in row.items():
        if name == "BLOCK_R":
            continue
        if isinstance(value, bool):
            yield row | {name: not value}
            continue
        choices = _BLOCKS if name.startswith("BLOCK_") else _WHOLE_NUMBERS.get(name, ())
        smaller = [choice for choice in choices if choice < value][-1:]
        larger = [choice for choice in choices if choice > value][:1]
        for choice in smaller + larger:
            yield row | {name: choice}


def make_call(size: Size, dtype: torch.dtype, device: torch.device, *, training: bool) -> ModulationInputs:
    """The op's inputs on random tensors, as a training step or an inference step passes them."""
    generator = torch.Generator(device).manual_seed(0)
    T, d, E, r = size

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype).requires_grad_(training)

    def weight(*shape: int) -> Tensor:
        return draw(*shape, scale=shape[-1] ** -0.5)

    weights = (weight(d, d), weight(E, r, d), weight(E, r, r), weight(E, d, r), weight(E, d))
    seed = torch.ones((), dtype=torch.int64, device=device)
    return _prepare(draw(T, d), draw(T, d), *weights, seed=seed if training else None, backend="triton")


def make_passes(x: ModulationInputs, *, training: bool) -> dict[str, Callable[[Launcher], list[Tensor]]]:
    """The op's passes as functions of a launcher: in training forward, backward and a forward that keeps nothing.

    Otherwise inference of few tokens, by the kernels of decoding.
    """
    if not training:
        return {"inference": lambda launch: [decode_forward(launch, x)[0]]}
    grad = torch.randn_like(x.attn_output)
    grad_load, grad_router_prob = (torch.ones(x.num_experts, device=x.hidden.device) for _ in range(2))
    needs = [getattr(x, name) is not None for name in DIFFERENTIABLE]
    saved: list[Any] = []

    def forward(launch: Launcher) -> list[Tensor]:
        out, load, router_prob, kept = triton_backend.run_forward(x, launch)
        saved[:] = [kept]
        return [out, load, router_prob]

    def backward(launch: Launcher) -> list[Tensor]:
        return triton_backend.run_backward(grad, grad_load, grad_router_prob, x, saved[0], needs, launch)

    not_kept = x._replace(keep=False)
    return {
        "forward": forward,
        "backward": backward,
        NOT_KEPT: lambda launch: [triton_backend.run_forward(not_kept, launch)[0]],
    }


def graph_time(run: Callable[[], Any]) -> float:
    """Median device time in microseconds of a call replayed as a CUDA graph, L2 cleared before each replay."""
    from triton.testing import do_bench

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    time = do_bench(graph.replay, warmup=2, rep=15, return_mode="median") * 1e3
    del results
    return time


@dataclass
class Tuner:
    """Measures candidates for one table.

    Args:
        table: the present one.
        measure: time of a call in microseconds.
        keep_on: asked before each measurement; False ends the search with what is known.
    """

    table: Table
    measure: Callable[[Callable[[], Any]], float] = graph_time
    keep_on: Callable[[], bool] = lambda: True
    inline_assembly: bool = True
    found: list[Measurement] = field(default_factory=list)

    def candidates(self, sizes: Sequence[Size], calls: Callable[[Size], ModulationInputs]) -> dict[str, list[Config]]:
        """By kernel, without repetition: the rows that the sizes pick now, then their neighbours."""
        by_kernel: dict[str, list[Config]] = {}
        for size in sizes:
            x = calls(size)
            for table in self._structures():
                for kernel, row in self._asked(x, table, training=size.tokens > DECODE_TOKENS).items():
                    rows = by_kernel.setdefault(kernel, [])
                    rows += [row] if row not in rows else []
        for rows in by_kernel.values():
            for row in list(rows):
                rows += [candidate for candidate in neighbours(row) if candidate not in rows]
        return by_kernel

    def _structures(self) -> list[Table]:
        """The table, with its candidates, and without each optional kernel that it uses."""
        used = (kernel for kernel in OPTIONAL if not all(map(_is_candidate, self.table.get(kernel, []))))
        return [self.table, with_candidates(self.table), *(_without(self.table, kernel) for kernel in used)]

    def _asked(self, x: ModulationInputs, table: Table, *, training: bool) -> dict[str, Config]:
        launch = RowLauncher(table, inline_assembly=self.inline_assembly)
        for run in make_passes(x, training=training).values():
            run(launch)
        return launch.asked

    def compile_ahead(self, size: Size, x: ModulationInputs, candidates: dict[str, list[Config]], workers: int) -> None:
        """Compile the candidates of the kernels that this size launches in parallel threads, into triton's cache.

        One kernel after the other, as long as ``keep_on`` allows: what is being compiled can't be stopped.
        """
        import triton

        training = size.tokens > DECODE_TOKENS
        asked: dict[str, Table] = {}
        for table in self._structures():
            asked = dict.fromkeys(self._asked(x, table, training=training), table) | asked
        passes = make_passes(x, training=training).values()
        with ThreadPoolExecutor(workers) as pool:
            for kernel, table in asked.items():
                if not self.keep_on():
                    return
                with triton.AsyncCompileMode(pool, ignore_errors=True):
                    for row in candidates[kernel]:
                        launch = WarmUpLauncher(table | {kernel: [row]}, inline_assembly=self.inline_assembly)
                        for run in passes:
                            run(launch)

    def run(self, size: Size, x: ModulationInputs, candidates: dict[str, list[Config]]) -> None:
        """Measure every candidate of the kernels that this size launches, each in the first pass that does."""
        training = size.tokens > DECODE_TOKENS
        measured: set[str] = set()
        for pass_, run in make_passes(x, training=training).items():
            shipped = RowLauncher(self.table, inline_assembly=self.inline_assembly)
            expected = [result.clone() for result in run(shipped)]
            enabled = RowLauncher(with_candidates(self.table), inline_assembly=self.inline_assembly)
            run(enabled)
            tables = dict.fromkeys(shipped.asked, self.table)
            plan: list[tuple[str, Config, Table]] = []
            for optional in OPTIONAL if training else ():
                if optional not in measured and optional in enabled.asked:
                    without = _without(self.table, optional)
                    others = RowLauncher(without, inline_assembly=self.inline_assembly)
                    run(others)
                    plan.append((optional, LEFT_OUT, without))
                    tables = dict.fromkeys(others.asked, without) | tables | {optional: self.table}
            tables = {kernel: table for kernel, table in tables.items() if kernel not in measured}
            plan += [(kernel, row, table) for kernel, table in tables.items() for row in candidates[kernel]]
            measured |= tables.keys()
            for kernel, row, table in plan:
                if not self.keep_on():
                    return
                self.found.append(self._measure(Measurement(kernel, pass_, size, row), table, run, expected))

    def _measure(self, result: Measurement, table: Table, run, expected: list[Tensor]) -> Measurement:
        if result.row != LEFT_OUT:
            table = table | {result.kernel: [result.row]}
        launch = RowLauncher(table, inline_assembly=self.inline_assembly)
        try:
            got = run(launch)
            result.refusal = _difference(got, expected) or _spill(launch.spills)
            if result.refusal is None:
                result.median_us = self.measure(lambda: run(launch))
        except Exception as error:  # triton has no common class for what a bad configuration raises
            result.refusal = f"{type(error).__name__}: {error}"[:200]
        return result


def _difference(got: Iterable[Tensor], expected: Iterable[Tensor]) -> str | None:
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        if b.numel() == 0:
            continue
        error = ((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30)).item()
        if not error <= ROUNDING:
            return f"result {index} differs by {error:.3g} from the shipped row's"
    return None


def _spill(spills: dict[str, int]) -> str | None:
    spilled = {name: count for name, count in spills.items() if count}
    return f"spills registers: {spilled}" if spilled else None


def _is_candidate(row: Config) -> bool:
    return row.get("candidate", False)


def _without(table: Table, kernel: str) -> Table:
    return {name: rows for name, rows in table.items() if name != kernel}


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
            tuned[kernel] = [row for row in tuned[kernel] if _is_candidate(row)]
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hycam_kernels.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the table, for HYCAM_KERNELS_TABLES")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2400, 8192])
    parser.add_argument("--dim", type=int, nargs="+", default=[4096])
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--rank", type=int, default=64)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: no CUDA device: block sizes can only be measured on the GPU that will run them", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    family = family_of(device)
    if family is None:
        print(f"tune: {torch.cuda.get_device_name(device)}: no table to start from is shipped for it", file=sys.stderr)
        return 1
    sizes = [Size(tokens, d, options.experts, options.rank) for tokens in options.tokens for d in options.dim]
    tuner = Tuner(load_table(family))

    def call(size: Size) -> ModulationInputs:
        return make_call(size, torch.bfloat16, device, training=size.tokens > DECODE_TOKENS)

    candidates = tuner.candidates(sizes, call)
    for size in sizes:
        x = call(size)
        tuner.compile_ahead(size, x, candidates, workers=os.cpu_count() or 1)
        tuner.run(size, x, candidates)
        print(f"{size}: {len(tuner.found)} candidates measured", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{family}.json"
    path.write_text(table_text(winners(tuner.found, tuner.table)))
    print(f"wrote {path}; use it with HYCAM_KERNELS_TABLES={options.out.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
