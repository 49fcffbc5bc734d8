"""The soak in short, and that it finds what it looks for."""

import json
import os
import signal
import sys

import pytest

from benchmarks.harness.record import ROOT, Record
from benchmarks.models import soak
from benchmarks.models.soak import Soak, SoakError
from benchmarks.soak import main


class Scripted(Soak):
    """Attempts that follow a script instead of running anything."""

    def __init__(self, folder, *, losses=(1.0, 1.0), kills=2):
        super().__init__(folder, folder / "recipe.yaml", 1.0)
        self.losses, self.kills, self.attempts = losses, kills, []

    def attempt(self, name, kill_after, victims=()):
        self.attempts.append((name, kill_after, tuple(victims)))
        mine = [attempt for attempt in self.attempts if attempt[0] == name]
        return name == "undisturbed" or len(mine) > self.kills, 0.01

    def outcome(self, name):
        return {"losses": [{"step": 1, "loss": self.losses[name != "undisturbed"]}]}


def test_counts_kills_of_runs_that_came_out_alike(tmp_path):
    record = Record(tmp_path / "record.json", {})
    scripted = Scripted(tmp_path)
    assert soak.soak(scripted, record, 0.0, seed=0)
    assert record.content["kills_survived"] == 2
    assert [len(entry["kills"]) for entry in record.entries[1:]] == [2]
    # the time is up, so nothing is killed any more
    assert all(kill_after is None for _, kill_after, _ in scripted.attempts)


def test_another_loss_fails(tmp_path):
    record = Record(tmp_path / "record.json", {})
    assert not soak.soak(Scripted(tmp_path, losses=(1.0, 1.0 + 1e-12)), record, 60.0, seed=0)
    assert record.content["kills_survived"] == 0
    assert record.entries[1]["alike"] is False
    assert record.entries[1]["found"]["losses"][0]["loss"] != 1.0


def _processes(monkeypatch, code):
    class Own(Soak):
        def _process(self, name, rank, port):
            import subprocess

            return subprocess.Popen([sys.executable, "-c", code, str(rank)])

        def _tail(self, name):
            return "the end"

    return Own


def test_kills_the_chosen_ranks_and_leaves_nobody_behind(tmp_path, monkeypatch):
    own = _processes(monkeypatch, "import time; time.sleep(60)")(tmp_path, tmp_path / "recipe.yaml", 5.0)
    killed = []
    reap = Soak._reap

    def noting(processes):
        killed.append([process.poll() for process in processes])
        reap(processes)
        killed.append([process.returncode for process in processes])

    monkeypatch.setattr(Soak, "_reap", staticmethod(noting))
    monkeypatch.setattr(soak, "_GRACE", 0.3)
    done, seconds = own.attempt("run", 0.2, [1])
    assert not done
    assert seconds > 0.5
    assert killed == [[None, -signal.SIGKILL], [-signal.SIGKILL] * 2]


def test_a_run_that_hangs_is_an_error(tmp_path, monkeypatch):
    own = _processes(monkeypatch, "import time; time.sleep(60)")(tmp_path, tmp_path / "recipe.yaml", 0.5)
    with pytest.raises(SoakError, match=r"still running[\s\S]*the end"):
        own.attempt("run", None)


def test_a_run_that_fails_by_itself_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "_POLL", 2.0)  # both may end between two looks
    own = _processes(monkeypatch, "import sys; sys.exit(3)")(tmp_path, tmp_path / "recipe.yaml", 5.0)
    with pytest.raises(SoakError, match=r"exit status .*3[\s\S]*the end"):
        own.attempt("run", None)


def test_the_page_says_what_the_record_says():
    record = json.loads((ROOT / "benchmarks" / "results" / "soak.json").read_text())
    assert record["alike"]
    assert not record["git"]["dirty"]
    assert record["minutes"] == 30
    runs = [entry for entry in record["entries"] if entry["group"] == "disturbed"]
    kills = sum(len(run["kills"]) for run in runs)
    assert f"{len(runs)} runs survived {kills} kills" in (ROOT / "docs" / "scale.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_short_soak(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "OMP_WAIT_POLICY", "passive")
    assert main(["--minutes", "1", "--steps", "40", "--out", str(tmp_path / "soak.json"), "--seed", "1"]) == 0
    record = json.loads((tmp_path / "soak.json").read_text())
    assert record["alike"]
    assert record["kills_survived"] == sum(len(entry.get("kills", [])) for entry in record["entries"]) >= 1
    assert record["git"]["commit"]
    assert record["versions"]["transformers"]
