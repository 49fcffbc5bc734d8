"""Finding, loading and refusing the native passes: a shared library that the package's build may have put beside this.

It has each pass for AVX-512 and for AVX2; what the machine runs is chosen once a process, at the first use. Its threads
are those of the OpenMP runtime that torch has loaded. ``HYCAM_KERNELS_NATIVE=0`` in the environment turns it off, and
``avx2`` or ``avx512`` asks for one of the two.
"""

import ctypes
import functools
import os
import platform
import sys
import zlib
from collections.abc import Callable
from ctypes import CDLL, Structure, c_float, c_int64, c_void_p
from pathlib import Path

import torch  # noqa: F401 - its OpenMP runtime must be in the process

VARIABLE = "HYCAM_KERNELS_NATIVE"
VECTOR_SETS = ("avx512", "avx2")  # the better first
_PATH = Path(__file__).parent / "libhycam_cpu.so"
_SOURCES = Path(__file__).parent / "src"  # in a checkout


class Rows(Structure):
    """A matrix whose rows are contiguous, or none; ``stride`` counts elements, ``dtype`` is a code of `passes`."""

    _fields_ = (("data", c_void_p), ("stride", c_int64), ("dtype", c_int64))


_N, _P = c_int64, c_void_p
# as in src/*.cpp; pointers and sizes in the order of the C functions
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "few_tokens": (
        _N, _N, _N, _N, Rows, Rows, Rows, Rows, _P, _N, _P, _N, _P, _N, _P, _N, _P, _N, _P, _P,
        _P, _P, _P, _P, c_float, c_float, _N, _P, _P, _P, _N,
    ),
    "modulate": (
        _N, _N, _N, _N, _P, _N, _P, _N, _N, _P, _P, c_float, Rows, Rows, Rows, _N,
    ),
    "modulate_backward": (
        _N, _N, _N, _N, _P, _N, _P, _N, _P, _N, _N, _P, _P, _P, c_float,
        Rows, Rows, Rows, Rows, Rows, _N,
    ),
    "route": (
        _N, _N, _N, Rows, _P, _P, _P, c_float, _P, _P, _P, _P, _P, _P,
        _P, _N,
    ),
    "route_backward": (
        _N, _N, _P, _P, _P, _P, _P, c_float, _P, _P, Rows, _N,
    ),
    "sum_tokens": (_N, _N, _N, _P, Rows, _P, _P, _N, _N),
    "uniforms": (_N, _N, _P, _N),
}  # fmt: skip


class RefusedError(RuntimeError):
    """Why the native passes don't run in this process."""


def refusal() -> str | None:
    """Why the native passes don't run in this process; None where they do."""
    found = _load()
    return str(found) if isinstance(found, RefusedError) else None


def vector_set() -> str:
    """ "avx512" or "avx2": what the passes run on.

    Raises:
        RefusedError: they don't.
    """
    return _loaded()[0]


def function(name: str) -> Callable[..., None]:
    """A pass by its name in the sources.

    Raises:
        RefusedError: the native passes don't run in this process.
    """
    return _loaded()[1][name]


def _loaded() -> tuple[str, dict[str, Callable[..., None]]]:
    found = _load()
    if isinstance(found, RefusedError):
        raise found
    return found


@functools.cache
def _load() -> tuple[str, dict[str, Callable[..., None]]] | RefusedError:
    try:
        return _open(os.environ.get(VARIABLE, ""))
    except RefusedError as why:
        return why


def _open(wanted: str) -> tuple[str, dict[str, Callable[..., None]]]:
    """The vector set and its passes; ``wanted`` is the variable's value."""
    if wanted == "0":
        raise RefusedError(f"{VARIABLE}=0 turns the native passes off")
    if wanted not in ("", "1", *VECTOR_SETS):
        raise RefusedError(f"{VARIABLE}: got {wanted!r}, wanted 0, 1, {' or '.join(VECTOR_SETS)}")
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise RefusedError(f"the native passes are for x86-64 Linux, this is {platform.machine()} {platform.system()}")
    if not _PATH.exists():
        raise RefusedError("the native passes weren't built: the package was installed without a C++ compiler")
    try:
        library = CDLL(str(_PATH))
    except OSError as error:
        raise RefusedError(f"the native passes can't be loaded: {error}") from error
    library.hycam_sources.restype = ctypes.c_uint32
    if _SOURCES.exists() and library.hycam_sources() != checksum(_SOURCES):
        raise RefusedError("the native passes were built from other sources than those here: install the package again")
    able = [name for name in VECTOR_SETS if getattr(library, f"hycam_has_{name}")()]
    if not able or (wanted in VECTOR_SETS and wanted not in able):
        raise RefusedError(f"the native passes need a processor with {wanted or 'AVX2'}")
    chosen = wanted if wanted in VECTOR_SETS else able[0]
    library.hycam_use_openmp.argtypes = [c_void_p]
    library.hycam_use_openmp(_openmp_parallel())
    passes = {}
    for name, argtypes in _SIGNATURES.items():
        passes[name] = getattr(library, f"hycam_{name}_{chosen}")
        passes[name].argtypes, passes[name].restype = argtypes, None
    return chosen, passes


def checksum(sources: Path) -> int:
    """Of the C++ files of a folder, as setup.py built it in."""
    return zlib.crc32(b"".join(path.read_bytes() for path in sorted(sources.iterdir())))


def _openmp_parallel() -> int:
    """The address of ``GOMP_parallel`` in the OpenMP runtime that torch is linked to, whatever that file is called."""
    try:
        # by its soname, among what is loaded: a second copy would bring a second runtime
        torch_library = CDLL("libtorch_cpu.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        return ctypes.cast(torch_library.GOMP_parallel, c_void_p).value or 0
    except (OSError, AttributeError) as error:
        raise RefusedError(f"the native passes need torch's OpenMP runtime: {error}") from error
