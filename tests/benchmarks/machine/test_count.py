"""The committed counts are those of the code, and a count that grows is found, named and told how to accept."""

import os
import subprocess
import sys

import pytest

from benchmarks.count import main
from benchmarks.harness.record import ROOT
from benchmarks.machine.collect import VERSIONS
from benchmarks.machine.record import RECORD, load, write

same_versions = pytest.mark.skipif(
    any(load()[name] != version for name, version in VERSIONS.items()),
    reason=f"{RECORD.name} is of other versions than {VERSIONS}, whose code differs",
)


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    """An interpreter that compiles: without the variable, and apart from this process's import of triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)


@same_versions
def test_the_kernels_of_a_training_call_count_as_the_record_says():
    """Built for sm_90, one build a kernel; all targets' below."""
    script = """
from benchmarks.count import ACCEPT
from benchmarks.machine import builds, collect, record
launches = dict.fromkeys(use.launch for use in next(collect.runs("sm_90")).uses)
found = [builds.count(launch, "sm_90") for launch in launches]
assert len(found) > 6
keys = {builds.key(build) for build in found}
known = [build for build in record.load()["builds"] if builds.key(build) in keys]
changes = list(builds.differences(known, found))
assert not changes, "\\n".join([*changes, f"to accept them: {ACCEPT}"])
"""
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
@same_versions
def test_every_build_counts_as_the_record_says():
    done = run_python("-m", "benchmarks.count", "--check")
    assert done.returncode == 0, done.stderr


@same_versions
def test_a_count_that_grew_fails_and_says_how_to_accept_it(tmp_path):
    """Against a record in which one kernel had a special function less; nothing is written."""
    record = load()
    kernel = next(
        build for build in record["builds"] if (build["target"], build["kernel"]) == ("sm_90", "token_mean_kernel")
    )
    counted = kernel["parts"][0]["counts"]["special"]
    kernel["parts"][0]["counts"]["special"] = counted - 128
    path = tmp_path / "counts.json"
    write(path, record)
    before = path.read_text()
    command = ["-m", "benchmarks.count", "--targets", "sm_90", "--kernels", "token_mean_kernel", "--record", str(path)]
    done = run_python(*command, "--check")
    assert done.returncode == 1, done.stdout + done.stderr
    (change,) = [line for line in done.stderr.splitlines() if "special" in line]
    assert change.startswith("sm_90 token_mean_kernel (")
    assert change.endswith(f"special, outside loops, grew from {counted - 128} to {counted}")
    assert "1 changes; to accept them: python -m benchmarks.count" in done.stderr
    assert path.read_text() == before
    accepted = run_python(*command)
    assert accepted.returncode == 0, accepted.stderr
    assert load(path) == load()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernels", "no_kernel"], "there is no no_kernel"),
        (["--targets", "sm_20"], "invalid choice: 'sm_20'"),
        (["--check", "--record", "of-another-version.json"], "was counted with {'triton': '3.0.0'"),
    ],
)
def test_arguments(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "of-another-version.json", {**load(), "triton": "3.0.0"})
    with pytest.raises(SystemExit) as refused:
        main(["--targets", "sm_90", *arguments])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as refused:
        main([])
    assert refused.value.code == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
