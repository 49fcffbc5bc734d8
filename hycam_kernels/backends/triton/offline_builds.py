"""Builds of the kernels for a GPU that isn't there: no driver needed.

The backend runs on tensors without data, so that each launch is recorded with exactly the types, strides and constants
that a real call would give triton; each distinct one is compiled and its binary read.
"""

import dataclasses
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hycam_kernels.backends.triton import modulation as triton_backend
from hycam_kernels.backends.triton import norm_projection as norm_triton_backend
from hycam_kernels.backends.triton.config_tables import load_table, with_candidates
from hycam_kernels.backends.triton.kernels.decode import decode_forward
from hycam_kernels.backends.triton.launch import COMPILER_OPTIONS, Launcher
from hycam_kernels.backends.triton.offline_calls import calls
from hycam_kernels.inputs import (
    DIFFERENTIABLE,
    NORM_DIFFERENTIABLE,
    ModulationInputs,
    NormProjectInputs,
    NormSaved,
    NormUpstream,
)

# bytes of shared memory that one block may ask for
SHARED_LIMITS = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
}
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
_OPTIONS = ("num_warps", "num_stages")


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel with the types and constants of a call; ``tiles`` are the constants that its table's row gives."""

    kernel: Any
    tiles: tuple[tuple[str, int], ...]
    signature: tuple[tuple[str, str], ...]
    aligned: frozenset[str]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def dtype(self) -> str:
        types = dict(self.signature)
        inputs = (types.get(name, "") for name in ("hidden", "v", "s", "total_0"))
        return next((kind[1:] for kind in inputs if kind.startswith("*")), "fp32")

    @property
    def absent(self) -> list[str]:
        """The optional tensors that the call doesn't give."""
        return sorted(name for name, value in self.constants if value is None)

    def description(self) -> dict[str, Any]:
        """What tells this build from the kernel's others: dtype, constants, warps and stages."""
        used = {name: value for name, value in self.constants if name.isupper()}
        return {"dtype": self.dtype} | used | dict(self.options) | {"absent": self.absent}

    def configuration(self) -> tuple:
        """Kernel, dtype, warps, stages and tiles: its table's row, and the blocks that follow from the sizes."""
        row = dict(self.tiles)
        tiles = tuple(item for item in self.constants if item[0] in row or item[0].startswith("BLOCK_"))
        return self.name, self.dtype, tiles, self.options


class Recorder(Launcher):
    """A launcher that records instead."""

    def __init__(self, family: str) -> None:
        super().__init__(family, inline_assembly=family.startswith("sm_"))
        self.launches: dict[Launch, None] = {}
        self.used_rows: set[tuple[str, int]] = set()

    def row(self, kernel: str, x: ModulationInputs | NormProjectInputs) -> int | None:
        index = super().row(kernel, x)
        if index is not None:
            self.used_rows.add((kernel, index))
        return index

    def unused_rows(self) -> list[tuple[str, int]]:
        rows = {(kernel, index) for kernel, rows in self.table.items() for index in range(len(rows))}
        return sorted(rows - self.used_rows)

    def __call__(self, kernel, grid, config, **arguments) -> None:
        self.launches[specialise(kernel, dict(config), arguments)] = None


def specialise(kernel, config: dict[str, int], arguments: dict[str, Any]) -> Launch:
    """What triton's launcher derives: None and 1 become constants, multiples of 16 and pointers are marked aligned."""
    options = tuple((name, config.pop(name)) for name in _OPTIONS)
    values = arguments | config
    signature, constants, aligned = {}, {}, set()
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            aligned.add(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if value % 16 == 0:
                aligned.add(name)
    return Launch(
        kernel, tuple(config.items()), tuple(signature.items()), frozenset(aligned), tuple(constants.items()), options
    )


def record(family: str) -> Recorder:
    """Every distinct launch of both passes over `offline_calls`, without the tables' candidates and with them."""
    recorder = Recorder(family)
    tables = (load_table(family), with_candidates(load_table(family)))
    for recorder.table, x in itertools.product(tables, calls()):
        record_call(recorder, x)
    return recorder


def record_call(recorder: Recorder, x: ModulationInputs | NormProjectInputs) -> None:
    """The launches of both passes of one call, with all gradients, or of its decoding."""
    if isinstance(x, NormProjectInputs):
        hidden, v, logits, mean, rstd = norm_triton_backend.forward(x, recorder)
        needs = [getattr(x, name) is not None for name in NORM_DIFFERENTIABLE]
        norm_triton_backend.backward(NormUpstream(hidden, v, logits), x, NormSaved(hidden, mean, rstd), needs, recorder)
    elif triton_backend.decodes(x):
        decode_forward(recorder, x)
    else:
        out, load, router_prob, saved = triton_backend.forward(x, recorder)
        needs = [getattr(x, name) is not None for name in DIFFERENTIABLE]
        triton_backend.backward(out, load, router_prob, x, saved, needs, recorder)


def one_of_each_configuration(launches: Iterable[Launch]) -> list[Launch]:
    """Of the launches with the same dtype, tiles, warps and stages the one with the most tensors, the hungriest."""
    chosen: dict[tuple, Launch] = {}
    for launch in launches:
        configuration = launch.configuration()
        if configuration not in chosen or len(launch.absent) < len(chosen[configuration].absent):
            chosen[configuration] = launch
    return list(chosen.values())


class Binary(NamedTuple):
    """What the compiler made of a launch for a target.

    Attributes:
        registers: of a thread, on AMD vector registers of a lane.
        spill_bytes: of stack or scratch memory a thread.
        shared_bytes: of a program.
        code: SASS as nvdisasm prints it, or AMD's assembly.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    code: str

    @property
    def mma(self) -> str:
        """The matrix instruction in it."""
        if "v_mfma" in self.code:
            return "MFMA"
        found = re.search(r"\b(HGMMA|UTCHMMA|HMMA)\b", self.code)
        return found[1] if found else "none"


def build(launch: Launch, target: str) -> dict[str, Any]:
    """Compile for one target and read registers, spills, shared memory and the matrix instruction off the binary."""
    binary = compile_launch(launch, target)
    return {
        "kernel": launch.name,
        "target": target,
        "config": launch.description(),
        "registers": binary.registers,
        "spill_bytes": binary.spill_bytes,
        "shared_bytes": binary.shared_bytes,
        "mma": binary.mma,
    }


def compile_launch(launch: Launch, target: str) -> Binary:
    """The launch's binary for one target."""
    arch: int | str = int(target.removeprefix("sm_")) if target.startswith("sm_") else target
    gpu = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    names = [parameter.name for parameter in launch.kernel.params]
    source = ASTSource(
        launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        # in the arguments' order, which triton's cache tells builds apart by too
        attrs={(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name in launch.aligned},
    )
    compiled = triton.compile(source, target=gpu, options=dict(launch.options) | COMPILER_OPTIONS)
    shared = compiled.metadata.shared
    if isinstance(arch, int):
        return _read_cubin(compiled.asm["cubin"], shared)
    return _read_amdgcn(compiled.asm["amdgcn"], shared)


def _read_cubin(cubin: bytes, shared_bytes: int) -> Binary:
    """A second ``ptxas -v`` on the PTX gives other counts: triton passes it options of its own."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        code = _run(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump --dump-resource-usage: no resource line in {usage!r}")
    registers, stack, local = map(int, found.groups())
    return Binary(registers, max(stack, local), shared_bytes, code)


def _read_amdgcn(code: str, shared_bytes: int) -> Binary:
    def number(field: str) -> int:
        found = re.search(rf"\.{field}:\s*(\d+)", code)
        if found is None:
            raise RuntimeError(f"the amdgcn assembly has no {field}")
        return int(found[1])

    return Binary(number("vgpr_count"), number("private_segment_fixed_size"), shared_bytes, code)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def fault(row: dict[str, Any]) -> str | None:
    """Why a build must not ship."""
    if row["spill_bytes"]:
        return f"spills {row['spill_bytes']} bytes"
    limit = SHARED_LIMITS[row["target"]]
    if row["shared_bytes"] > limit:
        return f"needs {row['shared_bytes']} bytes of shared memory of {limit}"
    return None


def attempts(target: str, *, once: bool) -> Iterator[tuple[dict[str, Any] | None, str | None]]:
    """All that ships for a target: each `build`, and a line on its fault if it has one.

    The line alone where there is no build: of a row that no call uses, or what the compiler refuses.

    Args:
        once: only `one_of_each_configuration`.
    """
    recorder = record(target)
    for kernel, index in recorder.unused_rows():
        yield None, f"{target} {kernel}: no call uses row {index}"
    for launch in one_of_each_configuration(recorder.launches) if once else recorder.launches:
        at = f"{target} {launch.name} {launch.description()}"
        try:
            row = build(launch, target)
        except Exception as error:  # whatever the compiler raises is a fault of this build alone
            yield None, f"{at}: {type(error).__name__}: {error}"
        else:
            reason = fault(row)
            yield row, reason and f"{at}: {reason}"
