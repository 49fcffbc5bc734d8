"""The library of native passes: its place in the process, who gets it and who is refused, and how it is built."""

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from hycam_kernels import explain_backend, hycam_modulation
from hycam_kernels.backends.cpu import library
from tests.kernels.cases import Case, run

ROOT = Path(__file__).parents[4]
CASE = Case((64,), 48, options={"seed": 3})

# what a process does before it asks something of itself
CALL = """
import os, sys, torch
from hycam_kernels import hycam_modulation
from hycam_kernels.backends.cpu import library, passes

def call(threads=2):
    torch.set_num_threads(threads)
    hidden, weight = torch.randn(4096, 64), torch.eye(64, requires_grad=True)
    hycam_modulation(hidden, hidden, weight, None, None, None, None).hidden_states.sum().backward()
    return weight.grad

def mapped(*parts):
    return {line.split()[-1] for line in open("/proc/self/maps") if any(part in line for part in parts)}
"""


def run_python(code: str, cwd: Path = ROOT, **environment: str) -> str:
    """What a process of its own prints; its threads are not held to one."""
    variables = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", library.VARIABLE)} | environment
    done = subprocess.run(
        [sys.executable, "-c", CALL + code], capture_output=True, text=True, timeout=120, cwd=cwd, env=variables
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_was_built():
    assert library.refusal() is None
    assert library.vector_set() in library.VECTOR_SETS


def test_there_is_one_openmp_runtime():
    code = "call(); print(*sorted(mapped('libgomp', 'libomp', 'libiomp'))); print(*mapped('libhycam_cpu'))"
    runtimes, own = run_python(code).splitlines()
    assert len(runtimes.split()) == 1, runtimes
    assert own.endswith("libhycam_cpu.so")


def test_importing_loads_and_writes_nothing():
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "hycam_kernels").rglob("*")}
    assert run_python("print(*mapped('libhycam_cpu'))", PYTHONDONTWRITEBYTECODE="1") == ""
    run_python("call()", PYTHONDONTWRITEBYTECODE="1")
    assert {path: path.stat().st_mtime_ns for path in (ROOT / "hycam_kernels").rglob("*")} == before


def test_denormals_stay_as_they_were():
    """In the thread that loads it, in OpenMP's, and in threads that start after it."""
    code = """
import threading
def denormal():
    found.append((5e-324 * 1.0 > 0, bool((torch.full((4096, 64), 1e-40) * 1.0 > 0).all())))
found = []
denormal(), call(), denormal()
thread = threading.Thread(target=denormal)
thread.start(), thread.join()
print(found == [(True, True)] * 3)
"""
    assert run_python(code) == "True"


def test_as_many_threads_as_torch_has():
    code = """
def tasks():
    return len(os.listdir("/proc/self/task"))
rows = torch.zeros(8192, 64)
found = []
for threads in (1, 3):
    torch.set_num_threads(threads)
    before = tasks()
    passes.modulate(rows, rows.new_empty(0, *rows.shape), rows, None, 1.0, rows, None, torch.empty_like(rows))
    found.append(tasks() - before)
print(found)
"""
    assert run_python(code, OMP_NUM_THREADS="1") == "[0, 2]"


def test_in_a_forked_process():
    """With one thread, as a DataLoader's workers have: the parent's threads aren't there any more."""
    code = """
call(2)
torch.manual_seed(0)
want = call(1)
child = os.fork()
if child == 0:
    torch.manual_seed(0)
    os._exit(0 if torch.equal(call(1), want) else 1)
print(os.waitpid(child, 0)[1], torch.isfinite(call(2)).all().item())
"""
    assert run_python(code) == "0 True"


class Modulated(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return run(hycam_modulation, CASE.make(torch.float32, seed=index))["grad_lora_b"]


def test_in_data_loader_workers():
    run(hycam_modulation, CASE.make(torch.float32))
    found = list(DataLoader(Modulated(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60))
    for index, got in enumerate(found):
        assert torch.equal(got, Modulated()[index])


def test_in_two_threads_at_once():
    cases = [CASE.make(torch.bfloat16, seed=seed) for seed in range(2)]
    want = [run(hycam_modulation, case) for case in cases]
    wrong = []

    def work(index: int) -> None:
        for _ in range(50):
            got = run(hycam_modulation, cases[index])
            wrong.extend(name for name, value in got.items() if not torch.equal(value, want[index][name]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def explained(dtype: torch.dtype = torch.float32) -> str:
    told = explain_backend(**CASE.make(dtype))
    assert told.startswith("torch: the triton backend can't run this call: ")
    return told.partition("; ")[2]


def test_it_says_what_runs(vectors):
    assert explained() == f"native code for {vectors.upper()} runs the element-wise passes"
    refused = "torch runs the element-wise passes: the native passes take float32, bfloat16 and float16"
    assert explained(torch.float64) == f"{refused}, the products are torch.float64"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("0", "HYCAM_KERNELS_NATIVE=0 turns the native passes off"),
        ("yes", "HYCAM_KERNELS_NATIVE: got 'yes', wanted 0, 1, avx512 or avx2"),
    ],
)
def test_the_variable_turns_it_off(value, reason, choose):
    choose(value)
    assert explained() == f"torch runs the element-wise passes: {reason}"
    with pytest.raises(library.RefusedError, match=reason):
        library.function("modulate")
    run(hycam_modulation, CASE.make(torch.float32))


def test_refused_where_it_was_not_built(choose, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_PATH", tmp_path / "libhycam_cpu.so")
    choose("")
    assert library.refusal() == "the native passes weren't built: the package was installed without a C++ compiler"
    (tmp_path / "libhycam_cpu.so").write_bytes(b"no library")
    choose("")
    assert library.refusal().startswith("the native passes can't be loaded: ")


def test_refused_on_another_machine(choose, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    choose("")
    assert library.refusal() == "the native passes are for x86-64 Linux, this is aarch64 Linux"


def test_refused_without_vectors(choose, monkeypatch):
    class OldProcessor:
        """The library on a processor that has neither set."""

        def __init__(self, path: str) -> None:
            self.hycam_sources = self.hycam_has_avx512 = self.hycam_has_avx2 = _Zero()

    class _Zero:
        def __call__(self) -> int:
            return 0

    monkeypatch.setattr(library, "CDLL", OldProcessor)
    monkeypatch.setattr(library, "_SOURCES", Path("/nowhere"))
    choose("")
    assert library.refusal() == "the native passes need a processor with AVX2"


def test_refused_when_built_from_other_sources(choose, monkeypatch, tmp_path):
    (tmp_path / "modulation.cpp").write_text("// newer")
    monkeypatch.setattr(library, "_SOURCES", tmp_path)
    choose("")
    assert library.refusal().startswith("the native passes were built from other sources than those here")


def test_refused_without_openmp(choose, monkeypatch):
    real = library.CDLL

    def without_torch(name, **options):
        if name == "libtorch_cpu.so":
            raise OSError("not loaded")
        return real(name, **options)

    monkeypatch.setattr(library, "CDLL", without_torch)
    choose("")
    assert library.refusal() == "the native passes need torch's OpenMP runtime: not loaded"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A source distribution of the checkout, unpacked: what `pip install` from source starts from."""
    folder = tmp_path_factory.mktemp("sources")
    checkout = folder / "checkout"
    ignored = shutil.ignore_patterns("*.so", "build", "*.egg-info", "__pycache__")
    for name in ("hycam", "hycam_cli", "hycam_kernels"):
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    (checkout / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "test_release.py", checkout / "tests")
    build(checkout, folder, "--sdist")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def build(checkout: Path, out: Path, *options: str, **environment: str) -> str:
    """Builds anew, and returns what was told."""
    shutil.rmtree(checkout / "build", ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(out), str(checkout)],
        capture_output=True, text=True, env=os.environ | environment, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_source_distribution_has_the_passes_and_no_half_of_the_tests(sources):
    assert sorted(path.name for path in (sources / "hycam_kernels/backends/cpu/src").iterdir()) == sorted(
        path.name for path in (ROOT / "hycam_kernels/backends/cpu/src").iterdir()
    )
    assert not (sources / "tests").exists()


def test_a_wheel_carries_it(sources, tmp_path):
    build(sources, tmp_path, "--wheel")
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux_x86_64" in wheel.name
    inside = [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("hycam_kernels/backends/cpu/")]
    assert "hycam_kernels/backends/cpu/libhycam_cpu.so" in inside
    assert not [name for name in inside if "/src/" in name]


def test_a_wheel_is_built_without_a_compiler(sources, tmp_path):
    """And what is installed from it says which passes run."""
    told = build(sources, tmp_path, "--wheel", CC="/no/compiler", CXX="/no/compiler")
    assert 'building extension "hycam_kernels.backends.cpu.libhycam_cpu" failed' in told
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = "from hycam.commands.env import backend_choices; print(library.__file__); print(backend_choices())"
    at, choices = run_python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed")).splitlines()
    assert at.startswith(str(tmp_path))
    assert "torch runs the element-wise passes: the native passes weren't built" in choices
