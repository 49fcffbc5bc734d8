"""What is damaged, or doesn't belong together, is told in a line, and what is whole is kept."""

import errno
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hycam.errors import InputError, RunStoppedError
from hycam.locks import claim
from hycam.training.folder import LOCK_FILE
from hycam.training.run import train
from hycam_cli import main
from tests.training.runs import assert_same_run, logged_numbers, rows, run_recipe, save_rows


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    train(run_recipe(folder, backbone))
    return folder / "run"


_SHORT = ["--prompt", "hello", "--evaluation.max_new_tokens", "4"]


def _rewrite_weights(folder: Path, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _rewrite_config(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def _first(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in tensors if "layers.1" in name)


ADAPTERS = {
    "extra tensor": lambda f: _rewrite_weights(f, lambda t: t.update(more=torch.zeros(2))),
    "missing tensor": lambda f: _rewrite_weights(f, lambda t: t.pop(_first(t))),
    "not a number": lambda f: _rewrite_weights(f, lambda t: t[_first(t)].view(-1)[0].fill_(float("nan"))),
    "infinite": lambda f: _rewrite_weights(f, lambda t: t[_first(t)].view(-1)[0].fill_(float("inf"))),
    "other shape": lambda f: _rewrite_weights(f, lambda t: t.update({_first(t): torch.zeros(3, 5)})),
    "layers edited": lambda f: _rewrite_config(f, layers_to_transform=[0]),
    "rank edited": lambda f: _rewrite_config(f, r=8),
    "experts edited": lambda f: _rewrite_config(f, num_experts=3),
    "no layer of that name": lambda f: _rewrite_config(f, target_modules=["nothing"]),
    "unknown kind": lambda f: _rewrite_config(f, peft_type="NOTHING"),
    "config a list": lambda f: (f / "adapter_config.json").write_text("[]"),
    "config empty": lambda f: (f / "adapter_config.json").write_text(""),
    "config {}": lambda f: (f / "adapter_config.json").write_text("{}"),
    "config cut": lambda f: (f / "adapter_config.json").write_text('{"peft_ty'),
    "weights empty": lambda f: (f / "adapter_model.safetensors").write_bytes(b""),
    "weights cut": lambda f: (f / "adapter_model.safetensors").write_bytes(
        (f / "adapter_model.safetensors").read_bytes()[:-9]
    ),
    "weights text": lambda f: (f / "adapter_model.safetensors").write_text("hello, this is no file of tensors"),
}


@pytest.mark.parametrize("damage", ADAPTERS)
def test_a_wrong_adapter_is_refused_in_a_line_wherever_it_is_loaded(
    tmp_path: Path,
    straight: Path,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    ADAPTERS[damage](run / "adapter")
    monkeypatch.setattr("hycam.training.trained.load_model", _no_model)
    for command in (
        ["eval", str(run), "--no-generation"],
        ["generate", str(run), *_SHORT],
        ["generate", "--adapter", str(run / "adapter"), *_SHORT],
    ):
        assert main(command) == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
        assert line.startswith("hycam: error: --adapter: ") and str(run / "adapter") in line


def _no_model(*arguments: Any) -> None:
    raise AssertionError("the model was loaded")


@pytest.mark.parametrize("damage", ["missing tensor", "not a number", "config a list"])
def test_a_wrong_adapter_is_not_gone_on_from(
    tmp_path: Path, backbone: Path, straight: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        ADAPTERS[damage](checkpoint)
        (checkpoint / "files.json").unlink()
    monkeypatch.setattr("hycam.training.prepare.load_model", _no_model)
    with pytest.raises(InputError, match=r"^--resume: .*checkpoint-8"):
        train(run_recipe(tmp_path, backbone), resume=True)


def test_an_adapter_loads_where_nothing_is_wrong(straight: Path) -> None:
    for kind in ("adapter", "checkpoint-4"):
        assert main(["generate", "--adapter", str(straight / kind), *_SHORT]) == 0


def test_a_backbone_with_another_adapter_in_its_folder(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would load it under the run's own."""
    merged = tmp_path / "merged"
    model: Any = AutoModelForCausalLM.from_pretrained(backbone)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(merged)
    AutoModelForCausalLM.from_pretrained(backbone).save_pretrained(merged)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(merged)
    monkeypatch.setattr("hycam.training.prepare.load_model", _no_model)
    with pytest.raises(InputError, match=r"merged holds an adapter too \(adapter_config.json\)"):
        train(run_recipe(tmp_path, backbone, backbone={"name_or_path": str(merged)}))
    monkeypatch.setattr("hycam.training.trained.load_model", _no_model)
    assert main(["generate", "--backbone.name_or_path", str(merged), "--prompt", "hello"]) == 2
    assert "merged holds an adapter too (adapter_config.json)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_hidden_layers": 4},
            r"tensors of its config.json are not among its weights, the first is model\.layers\.2",
        ),
        ({"hidden_size": 64}, r"can't be loaded: "),
        ({"vocab_size": 400}, r"can't be loaded: "),
    ],
)
def test_a_config_that_differs_from_the_weights(
    tmp_path: Path, backbone: Path, fields: dict[str, Any], message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(backbone, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(InputError, match=message) as error:
        train(run_recipe(tmp_path, copy))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "overwritten"])
def test_resuming_falls_back_to_the_last_whole_checkpoint(
    tmp_path: Path, backbone: Path, straight: Path, name: str, damage: str
) -> None:
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    file = tmp_path / "run" / "checkpoint-8" / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes({"empty": b"", "cut": content[:-1], "overwritten": bytes(len(content))}[damage])
    said: list[str] = []
    train(run_recipe(tmp_path, backbone), resume=True, announce=said.append)
    assert any(f"checkpoint-8 is not whole ({name} " in line for line in said)
    assert any(line.endswith("going on from " + str(tmp_path / "run" / "checkpoint-4")) for line in said)
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"data": 3',
        '{"data": [], "processes": 1}',
        '{"data": {"colours": 3}, "processes": 1}',
        '{"data": {"colours": {}}, "processes": 1}',
        '{"data": {}, "processes": 1, "settings": []}',
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, backbone: Path, straight: Path, content: str) -> None:
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json: not a run's record"):
        train(run_recipe(tmp_path, backbone), resume=True)


def test_a_record_without_a_task_is_of_other_rows(tmp_path: Path, backbone: Path, straight: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    record = json.loads(file.read_text())
    del record["data"]["colours"]
    file.write_text(json.dumps(record))
    with pytest.raises(InputError, match="rows of colours are no longer those that the run began with"):
        train(run_recipe(tmp_path, backbone), resume=True)


def test_results_that_say_too_little_are_no_end(tmp_path: Path, backbone: Path, straight: Path) -> None:
    """The last checkpoint has what they lack."""
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text('{"steps": 8}')
    train(run_recipe(tmp_path, backbone), resume=True)
    assert_same_run(tmp_path / "run", straight)


def test_a_record_of_a_later_version_is_no_damaged_one(tmp_path: Path, backbone: Path, straight: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    record = json.loads(file.read_text())
    assert record["format_version"] == 1
    file.write_text(json.dumps({"format_version": 2, "rows": record["data"]}))
    with pytest.raises(InputError, match=r"run\.json: format_version: got 2, which a later version wrote"):
        train(run_recipe(tmp_path, backbone), resume=True)


def test_a_run_that_has_ended_is_not_trained_again(
    tmp_path: Path, backbone: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last steps may have no checkpoint, or none of them one."""
    shutil.copytree(straight, tmp_path / "run")
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)

    def no_training(*arguments: Any, **options: Any) -> None:
        raise AssertionError("it was trained again")

    monkeypatch.setattr("hycam.training.trainer.HyCAMTrainer.train", no_training)
    said: list[str] = []
    train(run_recipe(tmp_path, backbone), resume=True, announce=said.append)
    assert any("the run has ended" in line for line in said)
    assert_same_run(tmp_path / "run", straight)


def test_what_a_failed_try_left_gives_way_to_a_corrected_recipe(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("hycam.training.run._fit", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(run_recipe(tmp_path, backbone))
    assert (tmp_path / "run" / "recipe.yaml").is_file()
    corrected = run_recipe(tmp_path, backbone, trainer={"learning_rate": 1e-3, "max_steps": 4})
    assert train(corrected, test=False)["steps"] == 4
    with pytest.raises(InputError, match="holds a run: --resume goes on with it"):
        train(run_recipe(tmp_path, backbone))


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_two_runs_in_one_folder(tmp_path: Path, backbone: Path, straight: Path, options: dict[str, bool]) -> None:
    """Whoever comes second is refused, and touches nothing; the lock of a run that was killed is free."""
    shutil.copytree(straight, tmp_path / "run")
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()}
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path / "run" / LOCK_FILE)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(InputError, match=r"output_dir: .*run: another process trains in it"):
            train(run_recipe(tmp_path, backbone), **options)
    finally:
        holder.kill()
        holder.wait()
    after = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()}
    assert after == before | {LOCK_FILE: b""}
    assert train(run_recipe(tmp_path, backbone), resume=True)["steps"] == 8
    assert not (tmp_path / "run" / LOCK_FILE).exists()


_HOLD = """
import sys, time
from pathlib import Path
from hycam.locks import claim
with claim(Path(sys.argv[1])) as held:
    print("held" if held else "not held", flush=True)
    time.sleep(600)
"""


def test_a_lock_whose_file_was_removed_is_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with claim(path) as first:
        path.unlink()
        with claim(path) as second, claim(path) as third:
            assert (first, second, third) == (True, True, False)


@pytest.mark.parametrize("place", ["optimizer", "metrics"])
def test_a_full_disk_is_told_and_the_run_goes_on(
    tmp_path: Path, backbone: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    recipe = run_recipe(tmp_path, backbone)
    with monkeypatch.context() as patch:
        if place == "optimizer":
            patch.setattr(torch, "save", _full_at("checkpoint-8", torch.save))
        else:
            patch.setattr("hycam.training.callbacks._json_line", _full_after(7))
        with pytest.raises(RunStoppedError, match=r"^disk full: .*checkpoint-4; with room, go on with: hycam train"):
            train(recipe)
    train(recipe, resume=True)
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device without room")
@pytest.mark.parametrize("command", [["eval", "--no-generation"], ["generate", *_SHORT]])
def test_a_full_disk_is_told_where_numbers_and_answers_are_written(
    straight: Path, command: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, str(straight), "--output", "/dev/full"]) == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith("hycam: error: disk full: ")


def _full_at(name: str, save: Any) -> Any:
    def saved(value: Any, path: Any, *arguments: Any, **options: Any) -> None:
        if name in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(value, path, *arguments, **options)

    return saved


def _full_after(count: int) -> Any:
    from hycam.training.callbacks import _json_line

    lines: list[str] = []

    def line(values: dict[str, Any]) -> str:
        if "loss" in values and len(lines) == count:
            raise OSError(errno.ENOSPC, "No space left on device")
        lines.append("")
        return _json_line(values)

    return line


@pytest.mark.parametrize("trainer", [{"logging_steps": 100}, {"max_steps": -1, "num_train_epochs": 0}])
def test_a_run_shorter_than_its_logs_distance_has_its_results(
    tmp_path: Path, backbone: Path, trainer: dict[str, Any]
) -> None:
    off = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    results = train(run_recipe(tmp_path, backbone, trainer=off | trainer))
    assert results["test"]["adapted"]["overall"]["tokens"] > 0
    assert (tmp_path / "run" / "results.json").is_file()
    assert not (tmp_path / "run" / "plots" / "loss.png").exists()
    assert not any("loss" in line for line in logged_numbers(tmp_path / "run"))


def test_an_output_that_can_not_be_written_is_refused_first(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hycam.training.trained.load_model", _no_model)
    (tmp_path / "folder").mkdir()
    for command in (["eval", str(straight)], ["generate", str(straight), "--prompt", "hello"]):
        for path, message in ((tmp_path / "folder", "is a folder"), (tmp_path / "none" / "a.json", "is no folder")):
            assert main([*command, "--output", str(path)]) == 2
            assert f"--output: {path if 'is a' in message else path.parent} {message}" in capsys.readouterr().err


def test_an_output_folder_that_can_not_be_made(tmp_path: Path, backbone: Path) -> None:
    (tmp_path / "file").write_text("")
    recipe = run_recipe(tmp_path, backbone, output_dir=str(tmp_path / "file" / "run"))
    with pytest.raises(InputError, match=r"output_dir: .*can't be made: Not a directory"):
        train(recipe)


def _with_tokens(backbone: Path, folder: Path, *, special: bool, pad: bool) -> Path:
    shutil.copytree(backbone, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if pad:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    else:
        tokenizer.add_tokens(["<|ticket|>"], special_tokens=special)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("place", ["pad", "train", "test"])
@pytest.mark.parametrize("special", [False, True])
def test_a_token_without_an_embedding_is_refused_before_loading(
    tmp_path: Path,
    backbone: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    special: bool,
    streamed: bool,
) -> None:
    if streamed and place == "train":
        pytest.skip("a stream's training rows are read while it trains")
    from hycam.data.splits import part_of

    monkeypatch.setattr("hycam.training.prepare.load_model", _no_model)
    copy = _with_tokens(backbone, tmp_path / "copy", special=special, pad=place == "pad")
    values = rows(40)
    for row in values:
        if part_of(row["instruction"], row["input"], 0) == place:
            row["output"] += " <|ticket|>"
    task = [{"name": "colours", "source": str(save_rows(tmp_path / "tickets.jsonl", values))}]
    data = {"streaming": {}} if streamed else {}
    with pytest.raises(InputError, match=r"has id 320, but .*copy has embeddings for 320 tokens") as error:
        train(run_recipe(tmp_path, copy, tasks=task, data=data))
    assert ("'[PAD]'" if place == "pad" else "'<|ticket|>'") in str(error.value)


def test_a_token_without_an_embedding_in_a_streams_training_row(tmp_path: Path, backbone: Path) -> None:
    from hycam.data.splits import part_of

    copy = _with_tokens(backbone, tmp_path / "copy", special=False, pad=False)
    values = rows(40)
    for row in values:
        if part_of(row["instruction"], row["input"], 0) == "train":
            row["output"] += " <|ticket|>"
    task = [{"name": "colours", "source": str(save_rows(tmp_path / "tickets.jsonl", values))}]
    with pytest.raises(InputError, match=r"the token '<\|ticket\|>' has id 320"):
        train(run_recipe(tmp_path, copy, tasks=task, data={"streaming": {}}))


def test_rows_to_evaluate_with_a_token_without_an_embedding(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hycam.training.trained.load_model", _no_model)
    copy = _with_tokens(backbone, tmp_path / "copy", special=False, pad=False)
    source = save_rows(tmp_path / "tickets.jsonl", [rows(1)[0] | {"output": "a <|ticket|>"}])
    options = ["--task", f"tickets={source}", "--split", "all", "--no-generation", "--data.prompt", "chat"]
    options += ["--data.max_length", "64", "--output", str(tmp_path / "all.json")]
    assert main(["eval", "--backbone.name_or_path", str(copy), *options]) == 2
    assert "tickets: the token '<|ticket|>' has id 320" in capsys.readouterr().err


def test_a_prompt_with_a_token_without_an_embedding(
    tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = _with_tokens(backbone, tmp_path / "copy", special=False, pad=False)
    began = time.monotonic()
    command = ["generate", "--backbone.name_or_path", str(copy), "--data.prompt", "chat", "--prompt", "a <|ticket|>"]
    assert main(command) == 2
    assert "the token '<|ticket|>' with id 320" in capsys.readouterr().err
    assert time.monotonic() - began < 60
