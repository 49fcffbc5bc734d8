"""Offline build of every kernel, in every configuration that ships, for every GPU family: no GPU and no driver needed.

``python -m hycam_kernels.aot [--targets sm_90 gfx942 ...] [--json FILE]``

The backend runs on tensors without data, so that each launch is recorded with exactly the types, strides and constants
that a real call would give triton; each distinct one is compiled and its binary read. Exit status 1 where a kernel
spills registers, exceeds the target's shared memory or doesn't compile, or a table's row is never used; 2 for a wrong
argument.
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import norm_triton_backend, triton_backend
from .inputs import DIFFERENTIABLE, NORM_DIFFERENTIABLE, ModulationInputs, NormProjectInputs
from .kernels.decode import decode_forward
from .kernels.launch import Launcher
from .kernels.tables import families, load_table, with_candidates

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
    """One kernel with the types and constants of a call. ``arguments`` and ``config`` are sorted item tuples."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    aligned: frozenset[str]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def description(self) -> dict[str, Any]:
        """What tells this configuration from the kernel's others: dtype, constants, warps and stages."""
        types = dict(self.signature)
        inputs = (types.get(name, "") for name in ("hidden", "v", "s"))
        dtype = next((kind[1:] for kind in inputs if kind.startswith("*")), "fp32")
        used = {name: value for name, value in self.constants if name.isupper()}
        optional = sorted(name for name, value in self.constants if value is None)
        return {"dtype": dtype} | used | dict(self.options) | {"absent": optional}


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
        self.launches[_specialise(kernel, dict(config), arguments)] = None


def _specialise(kernel, config: dict[str, int], arguments: dict[str, Any]) -> Launch:
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
    return Launch(kernel, tuple(signature.items()), frozenset(aligned), tuple(constants.items()), options)


def _calls() -> Iterator[ModulationInputs | NormProjectInputs]:
    """Calls of every kind, over the ranks, token counts, sizes and dtypes that the tables tell apart."""
    yield from _training_calls()
    yield from _decoding_calls()
    yield from _norm_calls()


def _training_calls() -> Iterator[ModulationInputs]:
    """The paper's op and the released code's."""
    for dtype, tokens, rank in itertools.product((torch.bfloat16, torch.float32), (512, 2400, 8192), (64, 256)):
        yield _call(tokens, rank, dtype)
    for experts, tokens in itertools.product((1, 16), (512, 2400, 8192)):
        yield _call(tokens, 64, torch.bfloat16, experts=experts)
    for rank in (16, 64, 256):
        yield _call(2400, rank, torch.bfloat16, released=True)
    yield _call(2400, 16, torch.bfloat16)
    yield _call(2400, 64, torch.float32, released=True)
    yield _call(2400, 64, torch.float16)
    yield _call(2400, 64, torch.bfloat16, shared=False)
    yield _call(2400, 0, torch.bfloat16)
    for tokens, rank in itertools.product((2400, 8192), (16, 64, 256)):
        yield _call(tokens, rank, torch.bfloat16, keep=False)
        yield _call(tokens, rank, torch.bfloat16, released=True, keep=False)
    yield _call(8192, 64, torch.bfloat16, experts=16, keep=False)
    yield _call(2400, 0, torch.bfloat16, keep=False)
    yield _call(2400, 64, torch.float16, keep=False)
    yield _call(2400, 64, torch.bfloat16, projected=True)


def _decoding_calls() -> Iterator[ModulationInputs]:
    """The same with few tokens and no gradients."""
    for dtype in (torch.bfloat16, torch.float32):
        for tokens, d in ((1, 2048), (1, 4096), (16, 4096), (32, 4096), (64, 4096)):
            yield _call(tokens, 64, dtype, d=d, needs_grad=False)
        yield _call(16, 256, dtype, needs_grad=False)
        yield _call(64, 256, dtype, needs_grad=False)
        yield _call(1, 0, dtype, needs_grad=False)
        yield _call(64, 64, dtype, released=True, needs_grad=False)
    yield _call(16, 64, torch.float16, needs_grad=False)


def _call(
    tokens: int,
    rank: int,
    dtype: torch.dtype,
    *,
    d=4096,
    experts=5,
    released=False,
    shared=True,
    needs_grad=True,
    keep=True,
    projected=False,
) -> ModulationInputs:
    """A call on meta tensors; rank 0 leaves the experts out, ``released`` adds all that the released code does,
    ``projected`` gives V and the logits."""

    def tensor(*shape: int, given: bool = True) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device="meta") if given else None

    E, r = experts, rank
    expert_bias = released and rank > 0
    projects = rank > 0 and not projected
    return ModulationInputs(
        hidden=torch.empty(tokens, d, dtype=dtype, device="meta"),
        attn_output=torch.empty(tokens, d, dtype=dtype, device="meta"),
        shared_weight=tensor(d, d, given=shared),
        lora_a=tensor(E, r, d, given=projects),
        lora_n=tensor(E, r, r, given=projects),
        lora_b=tensor(E, d, r, given=rank > 0),
        router_weight=tensor(E, d, given=projects),
        shared_bias=tensor(d, given=released and shared),
        lora_a_bias=tensor(E, r, given=expert_bias),
        lora_n_bias=tensor(E, r, given=expert_bias),
        lora_b_bias=tensor(E, d, given=expert_bias),
        router_bias=tensor(E, given=expert_bias),
        expert_weight=None,
        residual=tensor(tokens, d, given=released),
        given_v=tensor(tokens, E * r, given=projected),
        given_logits=torch.empty(tokens, E, device="meta") if projected else None,
        gumbel=None,
        seed=torch.empty((), dtype=torch.int64, device="meta") if rank else None,
        token_mask=torch.empty(tokens, dtype=torch.bool, device="meta") if released else None,
        tau=0.5,
        hard=released,
        scale=0.5 if released else 1.0,
        compute_dtype=dtype,
        keep=needs_grad and keep,
        needs_grad=needs_grad,
        backend="triton",
    )


def _norm_calls() -> Iterator[NormProjectInputs]:
    """`norm_project` of both kinds."""
    for dtype in (torch.bfloat16, torch.float32):
        for kind in ("rms", "layer"):
            for tokens, d in ((2400, 2048), (8192, 4096), (8192, 8192)):
                yield _norm_call(tokens, d, dtype, kind)
    yield _norm_call(2400, 4096, torch.float16, "rms")


def _norm_call(tokens: int, d: int, dtype: torch.dtype, kind: str, *, experts=5, rank=64) -> NormProjectInputs:
    def tensor(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return NormProjectInputs(
        hidden_in=tensor(tokens, d),
        norm_weight=tensor(d),
        norm_bias=tensor(d) if kind == "layer" else None,
        lora_a=tensor(experts, rank, d),
        lora_n=tensor(experts, rank, rank),
        router_weight=tensor(experts, d),
        eps=1e-6,
        kind=kind,
        compute_dtype=dtype,
        backend="triton",
    )


def record(family: str) -> Recorder:
    """Every distinct launch of both passes over the calls above, without the tables' candidates and with them."""
    recorder = Recorder(family)
    tables = (load_table(family), with_candidates(load_table(family)))
    for recorder.table, x in itertools.product(tables, _calls()):
        if isinstance(x, NormProjectInputs):
            hidden, v, logits, mean, rstd = norm_triton_backend.run_forward(x, recorder)
            needs = [getattr(x, name) is not None for name in NORM_DIFFERENTIABLE]
            norm_triton_backend.run_backward(hidden, v, logits, x, hidden, mean, rstd, needs, recorder)
            continue
        if triton_backend.decodes(x):
            decode_forward(recorder, x)
        else:
            out, load, router_prob, saved = triton_backend.run_forward(x, recorder)
            needs = [getattr(x, name) is not None for name in DIFFERENTIABLE]
            triton_backend.run_backward(out, load, router_prob, x, saved, needs, recorder)
    return recorder


def build(launch: Launch, target: str) -> dict[str, Any]:
    """Compile for one target and read registers, spills, shared memory and the matrix instruction off the binary."""
    arch: int | str = int(target.removeprefix("sm_")) if target.startswith("sm_") else target
    gpu = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    names = [parameter.name for parameter in launch.kernel.params]
    source = ASTSource(
        launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    compiled = triton.compile(source, target=gpu, options=dict(launch.options))
    read = _read_cubin(compiled.asm["cubin"]) if isinstance(arch, int) else _read_amdgcn(compiled.asm["amdgcn"])
    return {
        "kernel": launch.name,
        "target": target,
        "config": launch.description(),
        "registers": read["registers"],
        "spill_bytes": read["spill_bytes"],
        "shared_bytes": compiled.metadata.shared,
        "mma": read["mma"],
    }


def _read_cubin(cubin: bytes) -> dict[str, Any]:
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
    mma = re.search(r"\b(HGMMA|UTCHMMA|HMMA)\b", code)
    return {"registers": registers, "spill_bytes": max(stack, local), "mma": mma[1] if mma else "none"}


def _read_amdgcn(code: str) -> dict[str, Any]:
    """Registers of one lane; scratch bytes of one lane."""

    def number(field: str) -> int:
        found = re.search(rf"\.{field}:\s*(\d+)", code)
        if found is None:
            raise RuntimeError(f"the amdgcn assembly has no {field}")
        return int(found[1])

    return {
        "registers": number("vgpr_count"),
        "spill_bytes": number("private_segment_fixed_size"),
        "mma": "MFMA" if "v_mfma" in code else "none",
    }


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m hycam_kernels.aot", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--targets", nargs="+", choices=families(), default=families(), metavar="TARGET")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the builds as a list of objects")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing")

    print(f"triton {triton.__version__}")
    print(f"{'target':8}{'kernel':24}{'registers':>10}{'spill':>7}{'shared':>8}  {'mma':8} configuration")
    rows, faults = [], []
    for target in options.targets:
        recorder = record(target)
        faults += [f"{target} {kernel}: no call uses row {index}" for kernel, index in recorder.unused_rows()]
        for launch in recorder.launches:
            try:
                row = build(launch, target)
            except Exception as error:  # whatever the compiler raises is a fault of this build alone
                faults.append(f"{target} {launch.name} {launch.description()}: {type(error).__name__}: {error}")
                print(faults[-1])
                continue
            rows.append(row)
            config = " ".join(f"{k}={v}" for k, v in row["config"].items() if k != "absent")
            print(
                f"{target:8}{row['kernel']:24}{row['registers']:>10}{row['spill_bytes']:>7}{row['shared_bytes']:>8}  "
                f"{row['mma']:8} {config}",
                flush=True,
            )
            if reason := fault(row):
                faults.append(f"{target} {row['kernel']} {config}: {reason}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{len(rows)} builds, {len(faults)} faults")
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
