"""Candidate block sizes, measured on the GPU at hand.

Candidates of a kernel are the rows that the present table picks at the measured sizes and their neighbours, one number
changed, and for few experts of small ranks the rows of `further`, to which no single change leads. A candidate is timed
as part of the whole pass, as a CUDA graph; one that spills registers, fails to compile, or changes the pass's results
by more than a rounding can't win. Where a table may leave a kernel out, so that others do its work, leaving it out is a
candidate too; where it names one as a candidate, using it is.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hycam_kernels.backends.triton import modulation as triton_backend
from hycam_kernels.backends.triton.config_tables import (
    OPTIONAL,
    Config,
    Table,
    is_candidate,
    launch_parameters,
    with_candidates,
)
from hycam_kernels.backends.triton.kernels.decode import decode_forward
from hycam_kernels.backends.triton.launch import COMPILER_OPTIONS, Launcher
from hycam_kernels.inputs import DIFFERENTIABLE, ModulationInputs, NormProjectInputs
from hycam_kernels.preparation import prepare

# relative difference of bfloat16 results that another order of summation explains
ROUNDING = 2**-7
DECODE_TOKENS = triton_backend.MAX_DECODE_TOKENS
NOT_KEPT = "forward, S not kept"
_WHOLE_NUMBERS = {
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4),
    "SPLITS": (1, 2, 3, 4, 6, 8),
    "GROUP": (1, 4, 8, 16),
    "EXPERTS": (1, 2, 3, 5),
}
_BLOCKS = (16, 32, 64, 128, 256)
# rows of `further` keep every expert's V or sums at hand
FEW_EXPERTS, SMALL_RANK = 5, 64


def _rows(*tiles: tuple[int, int, int], **common: int) -> list[Config]:
    """Rows of 64 ranks a block from (tokens, features, warps)."""
    return [
        {"BLOCK_T": tokens, "BLOCK_D": features, "BLOCK_R": SMALL_RANK, **common, "num_warps": warps, "num_stages": 2}
        for tokens, features, warps in tiles
    ]


def further(processors: int) -> dict[str, list[Config]]:
    """By kernel: tiles for a loop over the experts, and those of programs that fill so many multiprocessors once."""
    tiles = _rows((64, 64, 4), (128, 64, 8), (128, 128, 8))
    resident = _rows((64, 64, 4), (128, 32, 8), (128, 64, 8), (256, 32, 16), PROGRAMS=processors)
    rows = {"fusion_forward": tiles + resident, "stream_grad": tiles + resident, "v_grad": [], "b_grad": []}
    for experts in (2, 3, 5):
        rows["v_grad"] += _rows((64, 64, 4), (128, 32, 8), (128, 64, 8), EXPERTS=experts, PROGRAMS=processors)
        rows["b_grad"] += _rows((64, 64, 4), (32, 128, 8), (64, 128, 8), EXPERTS=experts, PROGRAMS=processors)
    # one expert a program, of which a multiprocessor runs several at once
    rows["v_grad"] += _rows((64, 64, 4), EXPERTS=1, SPLITS=1)
    rows["b_grad"] += _rows((64, 64, 4), EXPERTS=1, SPLITS=4)
    return rows


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
        compiled = kernel[grid](**arguments, **config, **COMPILER_OPTIONS)
        self.spills[kernel.__name__] = getattr(compiled, "n_spills", 0)


class WarmUpLauncher(RowLauncher):
    """Compiles without launching."""

    def __call__(self, kernel, grid, config, **arguments) -> None:
        kernel.warmup(grid=grid, **arguments, **config, **COMPILER_OPTIONS)


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
    return prepare(draw(T, d), draw(T, d), *weights, seed=seed if training else None, backend="triton")


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
        out, load, router_prob, kept = triton_backend.forward(x, launch)
        saved[:] = [kept]
        return [out, load, router_prob]

    def backward(launch: Launcher) -> list[Tensor]:
        return triton_backend.backward(grad, grad_load, grad_router_prob, x, saved[0], needs, launch)

    not_kept = x._replace(keep=False)
    return {
        "forward": forward,
        "backward": backward,
        NOT_KEPT: lambda launch: [triton_backend.forward(not_kept, launch)[0]],
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
        processors: multiprocessors of the GPU; 0 leaves out `further` rows.
    """

    table: Table
    measure: Callable[[Callable[[], Any]], float] = graph_time
    keep_on: Callable[[], bool] = lambda: True
    processors: int = 0
    inline_assembly: bool = True
    found: list[Measurement] = field(default_factory=list)

    def candidates(self, sizes: Sequence[Size], calls: Callable[[Size], ModulationInputs]) -> dict[str, list[Config]]:
        """By kernel, without repetition: the rows that the sizes pick now, `further` ones, the former's neighbours."""
        by_kernel: dict[str, list[Config]] = {}
        for size in sizes:
            x = calls(size)
            for table in self._structures():
                for kernel, row in self._asked(x, table, training=size.tokens > DECODE_TOKENS).items():
                    rows = by_kernel.setdefault(kernel, [])
                    rows += [row] if row not in rows else []
        present = {kernel: list(rows) for kernel, rows in by_kernel.items()}
        if self.processors and all(size.num_experts <= FEW_EXPERTS and 0 < size.rank <= SMALL_RANK for size in sizes):
            for kernel, rows in further(self.processors).items():
                if kernel in by_kernel:
                    by_kernel[kernel] += [row for row in rows if row not in by_kernel[kernel]]
        for kernel, rows in by_kernel.items():
            for row in present[kernel]:
                rows += [candidate for candidate in neighbours(row) if candidate not in rows]
        return by_kernel

    def _structures(self) -> list[Table]:
        """The table, with its candidates, and without each optional kernel that it uses."""
        used = (kernel for kernel in OPTIONAL if not all(map(is_candidate, self.table.get(kernel, []))))
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

    def run(
        self,
        size: Size,
        x: ModulationInputs,
        candidates: dict[str, list[Config]],
        report: Callable[[Measurement], None] = lambda measurement: None,
    ) -> None:
        """Measure every candidate of the kernels that this size launches, each in the first pass that does.

        Args:
            report: called with each measurement as soon as it is made.
        """
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
                report(self.found[-1])

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


def _without(table: Table, kernel: str) -> Table:
    return {name: rows for name, rows in table.items() if name != kernel}
