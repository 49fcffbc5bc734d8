"""Runs of two processes that are killed at random and resumed, held against one that is left alone."""

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness.record import ROOT, Budget, Entry, Record
from hycam.training.scratch import ScratchConfig, train_scratch_backbone

PROCESSES = 2
# What is logged of training and validation, beside times, speeds and memory.
COMPARED = ("step", "epoch", "loss", "grad_norm", "learning_rate", "balance_loss", "eval_loss", "eval_perplexity")
_POLL = 0.05
# Seconds that a process has to end by itself after the other was killed, before it is killed too, as a launcher does
# it: one that has not met the other yet would wait for trainer.ddp_timeout.
_GRACE = 20.0


class SoakError(Exception):
    """A run that didn't survive: what happened, with the end of its output."""


@dataclass
class Soak:
    """The recipe and how it is run.

    Attributes:
        folder: for runs and their output.
        recipe: the recipe's file.
        limit: seconds after which a process that nobody killed hangs.
    """

    folder: Path
    recipe: Path
    limit: float

    def attempt(self, name: str, kill_after: float | None, victims: Sequence[int] = ()) -> tuple[bool, float]:
        """Start or resume the run called `name`; after so many seconds the victims, by rank, get a SIGKILL.

        Returns:
            Whether the run is done, and its seconds.

        Raises:
            SoakError: it failed by itself, or it hangs.
        """
        started = time.monotonic()
        processes = [self._process(name, rank, port) for port in [free_port()] for rank in range(PROCESSES)]
        try:
            killed: float | None = None
            while any(process.poll() is None for process in processes):
                seconds = time.monotonic() - started
                if kill_after is not None and killed is None and seconds >= kill_after:
                    for rank in victims:
                        processes[rank].kill()
                    killed = seconds
                if killed is not None and seconds > killed + _GRACE:
                    break
                if seconds > (kill_after or 0.0) + self.limit:
                    raise SoakError(f"{name}: still running after {seconds:.0f} s\n{self._tail(name)}")
                failed = any(process.poll() not in (None, 0) for process in processes)
                if failed and killed is None:
                    break
                time.sleep(_POLL)
        finally:
            self._reap(processes)
        statuses = [process.returncode for process in processes]
        if killed is None and any(statuses):
            raise SoakError(f"{name}: exit status {statuses}\n{self._tail(name)}")
        return not any(statuses), time.monotonic() - started

    def _process(self, name: str, rank: int, port: int) -> "subprocess.Popen[bytes]":
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
        network = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT}
        command = ["train", str(self.recipe), "--output_dir", str(self.folder / name), "--resume"]
        with self._output(name, rank).open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "hycam", *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {key: str(value) for key, value in (here | network).items()},
            )

    def _output(self, name: str, rank: int) -> Path:
        return self.folder / f"{name}-rank{rank}.log"

    def _tail(self, name: str) -> str:
        texts = (self._output(name, rank).read_text(encoding="utf-8", errors="replace") for rank in range(PROCESSES))
        return "\n".join(f"rank {rank}: {text[-1500:]}" for rank, text in enumerate(texts))

    @staticmethod
    def _reap(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def outcome(self, name: str) -> Entry:
        """What must not depend on kills."""
        run = self.folder / name
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        compared = [{key: line[key] for key in COMPARED if key in line} for line in lines]
        results = json.loads((run / "results.json").read_text(encoding="utf-8"))
        adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
        return {
            "losses": [line for line in compared if "loss" in line or "eval_loss" in line],
            "test": results["test"],
            "adapter_sha256": hashlib.sha256(adapter).hexdigest(),
        }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def prepare(folder: Path, steps: int, limit: float) -> Soak:
    """A tiny backbone and a recipe that trains it for so many steps, with twenty checkpoints on the way."""
    backbone = ScratchConfig(
        num_documents=300, vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, steps=10, batch_size=4, sequence_length=64,
    )  # fmt: skip
    every = max(1, steps // 20)
    values: dict[str, Any] = {
        "seed": 0,
        "output_dir": str(folder / "run"),
        "backbone": {"name_or_path": str(train_scratch_backbone(backbone, folder, seed=0))},
        "method": {"r": 4, "num_experts": 2},
        "tasks": [{"name": name, "max_rows": 200} for name in ("synthetic_reasoning", "synthetic_code")],
        "data": {"max_length": 256, "cache_dir": str(folder / "cache")},
        "trainer": {
            "max_steps": steps,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 4 * every,
            "save_strategy": "steps",
            "save_steps": every,
            "load_best_model_at_end": False,  # it would tie checkpoints to evaluations
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        },
        "evaluation": {"batch_size": 20},
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    return Soak(folder, recipe, limit)


def soak(prepared: Soak, record: Record, seconds_disturbed: float, seed: int) -> bool:
    """The undisturbed run, then disturbed ones for so many seconds; whether all of them came out alike."""
    done, seconds = prepared.attempt("undisturbed", None)
    if not done:
        raise SoakError("undisturbed: not done")
    wanted = prepared.outcome("undisturbed")
    last = [line["loss"] for line in wanted["losses"] if "loss" in line][-1]
    record.add({"group": "undisturbed", "seconds": seconds, "final_loss": last, **wanted})
    chance, budget = random.Random(seed), Budget(seconds_disturbed)
    survived, alike = 0, True
    for number in range(1, sys.maxsize):
        entry = disturbed_run(prepared, f"disturbed-{number}", budget, seconds, chance)
        found = prepared.outcome(f"disturbed-{number}")
        entry |= {"alike": found == wanted, "final_loss": [e["loss"] for e in found["losses"] if "loss" in e][-1]}
        if entry["alike"]:
            survived += len(entry["kills"])
        else:
            alike = False
            entry["found"] = found
        record.add(entry)
        print(f"run {number}: {len(entry['kills'])} kills, {'alike' if entry['alike'] else 'DIFFERENT'}", flush=True)
        if not (alike and budget.lasts(seconds)):
            break
    record.content |= {"kills_survived": survived, "runs": number, "alike": alike}
    record.write()
    return alike


def disturbed_run(prepared: Soak, name: str, budget: Budget, seconds: float, chance: random.Random) -> Entry:
    """One run to its end; each attempt is killed after a random part of `seconds`, until the time is up."""
    kills: list[Entry] = []
    done = False
    while not done:
        kill_after = chance.uniform(0.0, seconds) if budget.lasts() else None
        victims = chance.choice([[0], [1], [0, 1]])
        done, lasted = prepared.attempt(name, kill_after, victims)
        if not done:
            checkpoints = [int(path.name.rpartition("-")[2]) for path in (prepared.folder / name).glob("checkpoint-*")]
            found = {"ranks": victims, "after": kill_after, "ended": lasted, "checkpoint": max(checkpoints, default=0)}
            kills.append(found)
    return {"group": "disturbed", "run": name, "kills": kills}
