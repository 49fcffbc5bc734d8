"""Runs over two processes: what they save, and how they go on after a stop, a kill or a hang."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hycam.errors import InputError, RunStoppedError
from hycam.training.callbacks import read_metrics
from hycam.training.checkpoints import last_checkpoint
from hycam.training.engines import join_processes, timeouts_told
from hycam.training.recipe import load_recipe
from hycam.training.run import train
from tests.distributed.jobs import engine_fields
from tests.distributed.ranks import WORLD_SIZE, free_port, log_of, run_jobs
from tests.training.runs import recipe_values, save_backbone, save_recipe

pytest.importorskip("deepspeed")

ENGINES = ["ddp", "zero1", "zero2", "zero3", "fsdp2", "zero2_offload"]
# Four steps an epoch: the run is stopped inside its second one.
_STEPS, _SAVED, _STOPPED = 7, 3, 5
_OF_THE_PROCESS = ("tokens_per_second", "padding_share", "seconds", "peak_bytes")  # which counts from its beginning


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbone"))


def _recipe(folder: Path, backbone: Path, engine: str, **sections: Any) -> str:
    folder.mkdir(parents=True)
    values = recipe_values(folder, backbone, **sections)
    values["trainer"] |= {"max_steps": _STEPS, "per_device_train_batch_size": 8, "save_steps": _SAVED}
    values["trainer"] |= {"eval_steps": _SAVED} | engine_fields(engine) | sections.get("trainer", {})
    return str(save_recipe(folder, values))


def _assert_done(folder: Path, statuses: list[int], wanted: list[int]) -> None:
    assert statuses == wanted, "\n".join(log_of(folder, rank)[-3000:] for rank in range(WORLD_SIZE))


def _numbers(run: Path) -> list[dict[str, Any]]:
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "train_runtime" not in line]
    return [{key: value for key, value in line.items() if key not in _OF_THE_PROCESS} for line in lines]


def _assert_same_run(resumed: Path, straight: Path) -> None:
    assert _numbers(resumed) == _numbers(straight)
    got, want = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (resumed, straight))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    results = [json.loads((run / "results.json").read_text())["test"] for run in (resumed, straight)]
    assert results[0] == results[1]


def _stop_and_resume(
    folder: Path, backbone: Path, engine: str, *, step: int = _STOPPED, **sections: Any
) -> list[dict[str, Any]]:
    straight, stopped = (_recipe(folder / engine / name, backbone, engine, **sections) for name in ("straight", "stop"))
    fault = {"kind": "signal", "rank": 1, "step": step}
    return [
        {"job": "hycam", "arguments": ["train", straight]},
        {"job": "hycam", "arguments": ["train", stopped], "fault": fault, "status": 128 + signal.SIGTERM},
        {"job": "hycam", "arguments": ["train", stopped, "--resume"]},
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Path:
    """ZeRO-3 with a frozen router; FSDP2 on length-bucketed batches of tasks with a temperature.

    A mean of FSDP2's losses is that of the steps before the stop and after it.
    """
    folder = tmp_path_factory.mktemp("runs")
    bucketed = {"data": {"temperature": 3.0}, "trainer": {"train_sampling_strategy": "group_by_length"}}
    bucketed["trainer"] |= {"logging_steps": 3}
    jobs = _stop_and_resume(folder, backbone, "zero3", method={"train_router": False})
    jobs += _stop_and_resume(folder, backbone, "fsdp2", **bucketed)
    jobs.append(jobs[-1])  # there is nothing left to train: it measures again
    _assert_done(folder, run_jobs(folder, jobs), [0, 0])
    return folder


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_signal_to_one_process_stops_both_and_the_run_goes_on(runs: Path, engine: str) -> None:
    folder = runs / engine
    assert f"stopped by SIGTERM after step {_STOPPED}" in log_of(runs, 0)
    _assert_same_run(folder / "stop" / "run", folder / "straight" / "run")


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_the_files_are_whole_adapters(runs: Path, engine: str, backbone: Path) -> None:
    """On one process they give the perplexity that the two processes measured."""
    run = runs / engine / "straight" / "run"
    recipe = load_recipe(str(run))
    for file in (run / "adapter", run / f"checkpoint-{2 * _SAVED}"):
        weights = load_file(file / "adapter_model.safetensors")
        assert {name.split(".")[-1] for name in weights} == {"weight", "hycam_lora_a", "hycam_lora_n", "hycam_lora_b"}
        assert sum("hycam_router" in name for name in weights) == 2
        assert all(weight.numel() for weight in weights.values())
    from hycam_cli import main

    output = runs / f"{engine}.json"
    assert main(["eval", str(run), "--no-generation", "--output", str(output)]) == 0
    want = json.loads((run / "results.json").read_text())["test"]["adapted"]["overall"]["nll"]
    assert json.loads(output.read_text())["overall"]["nll"] == pytest.approx(want, rel=1e-5)
    assert recipe.output_path == run


def test_another_number_of_processes_is_refused(runs: Path) -> None:
    record = runs / "fsdp2" / "stop" / "run" / "recipe.yaml"
    record.write_text(record.read_text().replace("fsdp: true", "fsdp: false"))
    recipe = load_recipe(str(record.parent))
    with pytest.raises(InputError, match=r"began on 2 processes, got 1$"):
        train(recipe, resume=True)


def test_what_a_step_took_is_logged(runs: Path) -> None:
    lines = [line for line in read_metrics(runs / "zero3" / "straight" / "run" / "metrics.jsonl") if "loss" in line]
    assert len(lines) == _STEPS
    for line in lines:
        assert line["tokens_per_second"] > 0
        assert 0 < line["padding_share"] < 1
        assert line["peak_bytes"] > 2**20


def test_two_processes_share_a_stream(tmp_path: Path, backbone: Path) -> None:
    """They go on after a stop as if there had been none, and learn what one process learns of the same rows."""
    sections = {
        "data": {"streaming": {"shuffle_buffer": 8, "held_out_rows": 5}},
        "method": {"noise": "never", "balance_coef": 0.0},
        "trainer": {"per_device_train_batch_size": 4, "dataloader_num_workers": 2},
    }
    _assert_done(tmp_path, run_jobs(tmp_path, _stop_and_resume(tmp_path, backbone, "ddp", **sections)), [0, 0])
    two = tmp_path / "ddp" / "straight" / "run"
    _assert_same_run(tmp_path / "ddp" / "stop" / "run", two)
    sections["trainer"] = {"per_device_train_batch_size": 8}
    train(load_recipe(_recipe(tmp_path / "one", backbone, "ddp", **sections)))
    losses = [
        [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
        for run in (two, tmp_path / "one" / "run")
    ]
    assert len(losses[0]) == _STEPS
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def _killed(folder: Path, backbone: Path, engine: str) -> None:
    """A run whose second process is killed while it saves, and that then goes on."""
    recipe = _recipe(folder / "run", backbone, engine)
    killed = {"job": "hycam", "arguments": ["train", recipe]}
    killed["fault"] = {"kind": "kill", "rank": 1, "step": 2 * _SAVED}
    _assert_done(folder, run_jobs(folder, [killed]), [1, -signal.SIGKILL])
    assert "hycam: error: another process ended" in log_of(folder, 0)
    run = folder / "run" / "run"
    assert last_checkpoint(run) == run / f"checkpoint-{_SAVED}"
    straight = _recipe(folder / "straight", backbone, engine)
    jobs = [
        {"job": "hycam", "arguments": arguments} for arguments in (["train", recipe, "--resume"], ["train", straight])
    ]
    _assert_done(folder, run_jobs(folder, jobs), [0, 0])
    _assert_same_run(run, folder / "straight" / "run")


def test_a_kill_during_a_save_leaves_the_last_good_checkpoint(tmp_path: Path, backbone: Path) -> None:
    _killed(tmp_path, backbone, "ddp")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_a_kill_during_a_save_under_every_engine(tmp_path: Path, backbone: Path, engine: str) -> None:
    _killed(tmp_path, backbone, engine)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_stop_before_a_validation_and_resume_under_every_engine(tmp_path: Path, backbone: Path, engine: str) -> None:
    jobs = _stop_and_resume(tmp_path, backbone, engine, step=2 * _SAVED)
    _assert_done(tmp_path, run_jobs(tmp_path, jobs), [0, 0])
    assert f"stopped by SIGTERM after step {2 * _SAVED}" in log_of(tmp_path, 0)
    _assert_same_run(tmp_path / engine / "stop" / "run", tmp_path / engine / "straight" / "run")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES[:-1])
def test_packed_rows_are_checked_under_every_engine(tmp_path: Path, backbone: Path, engine: str) -> None:
    """Before the first step, by processes that may hold a part of each weight."""
    recipe = _recipe(tmp_path / engine, backbone, engine, data={"packing": True})
    _assert_done(tmp_path, run_jobs(tmp_path, [{"job": "hycam", "arguments": ["train", recipe]}]), [0, 0])
    mixing = ["--trainer.use_cache", "true", "--output_dir", str(tmp_path / "mixing")]
    jobs = [{"job": "hycam", "arguments": ["train", recipe, *mixing], "status": 2}]
    _assert_done(tmp_path, run_jobs(tmp_path, jobs), [0, 0])
    assert "data.packing: got true, wanted false: LlamaForCausalLM doesn't keep packed rows" in log_of(tmp_path, 0)


@pytest.mark.parametrize("engine", ["zero2", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_process_that_hangs_ends_the_run_with_a_message(tmp_path: Path, backbone: Path, engine: str) -> None:
    recipe = _recipe(tmp_path / "run", backbone, engine, trainer={"ddp_timeout": 6})
    job = {
        "job": "hycam",
        "arguments": ["train", recipe],
        "fault": {"kind": "hang", "rank": 1, "step": 2, "seconds": 25},
    }
    _assert_done(tmp_path, run_jobs(tmp_path, [job]), [1, 96])
    message = log_of(tmp_path, 0).strip().splitlines()[-1]
    assert message.startswith(
        "hycam: error: another process ended, hangs, or did not answer within trainer.ddp_timeout"
    )
    # so long before the other process ended by itself
    assert "Timed out waiting 6000ms" in message


def test_a_folder_of_its_own_for_each_node_is_refused(tmp_path: Path, backbone: Path) -> None:
    """At the start, and where only the first one holds the run."""
    recipe = _recipe(tmp_path / "run", backbone, "ddp")
    apart = ["--output_dir", str(tmp_path / "node{rank}")]
    jobs = [
        {"job": "apart", "arguments": ["train", recipe, *apart]},
        {"job": "apart", "arguments": ["train", recipe, *apart, "--resume"]},
    ]
    _assert_done(tmp_path, run_jobs(tmp_path, jobs), [0, 0])
    assert not (tmp_path / "node1").exists()
    for rank in range(WORLD_SIZE):
        message = f"output_dir: {tmp_path / f'node{rank}'} is not the same folder for every process"
        assert log_of(tmp_path, rank).count(message) == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_comes_is_told(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RunStoppedError, match=r"did not answer within trainer\.ddp_timeout"), timeouts_told():
        join_processes({"use_cpu": True, "ddp_timeout": 1})
