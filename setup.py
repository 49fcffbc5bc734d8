"""Builds the native passes of the CPU backend, a plain shared library that the package loads through ctypes.

They are optional: without a C++ compiler, or on another machine than x86-64 Linux, the package is installed without
them, and `hycam env` says that torch runs the passes. Everything else is in pyproject.toml.
"""

import platform
import sys
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("hycam_kernels/backends/cpu/src")
# no -ffast-math, here or at the link: it would make the whole process flush denormals
FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-fvisibility=hidden"]
# gcc takes the undefined lanes of its own intrinsics for a mistake
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
VECTOR_SETS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}


def checksum() -> int:
    """Of the sources, as `library.py` computes it to refuse a library that was built from others."""
    return zlib.crc32(b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir())))


class BuildLibrary(build_ext):
    """One library with the passes for each of the vector sets."""

    def build_extension(self, extension: Extension) -> None:
        build = Path(self.build_temp)
        objects = self._compile(extension.sources[:1], build, [f"-DHYCAM_SOURCES={checksum()}u"])
        for name, flags in VECTOR_SETS.items():
            objects += self._compile(extension.sources[1:], build / name, flags)
        target = self.get_ext_fullpath(extension.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, target, libraries=["m"], extra_postargs=["-s"], target_lang="c++")

    def _compile(self, sources: list[str], folder: Path, flags: list[str]) -> list[str]:
        return self.compiler.compile(sources, str(folder), extra_postargs=FLAGS + flags)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"


class PlatformWheel(bdist_wheel):
    """The library knows nothing of Python: one wheel serves every version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


library = Extension(
    "hycam_kernels.backends.cpu.libhycam_cpu",
    [str(SOURCES / name) for name in ("library.cpp", "few_tokens.cpp", "modulation.cpp", "routing.cpp")],
    depends=[str(path) for path in SOURCES.glob("*")],
    optional=True,
)
builds = sys.platform == "linux" and platform.machine() == "x86_64"
setup(
    ext_modules=[library] if builds else [],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel} if builds else {},
)
