"""Studies of tiny models, run: what is done once, what again, and by whom."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from hycam.data.splits import part_of
from hycam.errors import InputError
from hycam.locks import claim, is_claimed
from hycam.reporting.report import write_report
from hycam.reporting.runs import RunFolder, measure_text
from hycam.study.recipe import Study, load_study
from hycam.study.record import collect
from hycam.study.render import shown
from hycam.study.run import compare
from hycam.study.tables import study_tables
from hycam.study.units import Unit, cells, is_done, lock_file, run_folder, tuning, units
from hycam.training.callbacks import read_metrics
from hycam.training.recipe import load_recipe
from hycam.training.run import train
from hycam.training.trainer import HyCAMTrainer
from hycam_cli import main
from tests.study.studies import save_study, scratch_backbone, study_values
from tests.training.runs import logged_numbers, rows, save_backbone, save_rows

_ONE_METHOD = {"lora": {"name": "lora", "r": 2}}
_CONTEXT: Any = multiprocessing.get_context("forkserver")


def _study(folder: Path, backbone: Path, /, **sections: Any) -> Study:
    folder.mkdir(exist_ok=True)
    return load_study(str(save_study(folder, study_values(folder, backbone, **sections))))


def _started(target: Callable[..., object], *arguments: Any) -> BaseProcess:
    _CONTEXT.set_forkserver_preload(["hycam.study.worker"])
    process: BaseProcess = _CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def _call_main(arguments: list[str]) -> None:
    raise SystemExit(main(arguments))


def _write_lines(study: Study, output: Path) -> None:
    with output.open("a", buffering=1) as file:
        compare(study, lambda line: file.write(f"{line}\n"))


def _wait(condition: Callable[[], object], seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def _content(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Study:
    """A finished study: LoRA with a grid, of which one rate breaks down, and HyCAM, over two seeds."""
    methods = {
        "lora": {"name": "lora", "r": 2, "learning_rates": [1e-3, 1e-2, 1e30]},
        "hycam": {"r": 2, "num_experts": 2},
    }
    study = _study(tmp_path_factory.mktemp("study"), backbone, methods=methods)
    lines: list[str] = []
    compare(study, lines.append)
    assert [line.partition(": ")[0].partition(" ")[2] for line in lines] == [unit.folder for unit in units(study)]
    return study


def _record(study: Study) -> dict[str, Any]:
    return json.loads((study.output_path / "study.json").read_text())


def test_the_record_has_what_the_runs_measured(study: Study) -> None:
    record = _record(study)
    assert [(cell["method"], cell["seed"], cell["status"]) for cell in record["cells"]] == [
        ("lora", 0, "done"),
        ("hycam", 0, "done"),
        ("lora", 1, "done"),
        ("hycam", 1, "done"),
    ]
    for cell, unit in zip(record["cells"], cells(study), strict=True):
        folder = run_folder(study, unit)
        results = json.loads((folder / "results.json").read_text())
        metrics = read_metrics(folder / "metrics.jsonl")
        overall = results["test"]["adapted"]["overall"]
        assert cell["test"]["overall"]["perplexity"] == overall["perplexity"]
        assert cell["test"]["overall"]["loss"] == pytest.approx(overall["nll"] / overall["tokens"])
        assert cell["test"]["tasks"].keys() == {"colours", "animals"}
        assert cell["base"] == record["cells"][0]["base"]
        assert cell["parameters"] == results["parameters"] and cell["steps"] == 4
        assert cell["curves"]["loss"] == [[line["step"], line["loss"]] for line in metrics if "loss" in line]
        assert [step for step, _ in cell["curves"]["eval_loss"]] == [2, 4]
        assert 0 < cell["train_seconds"] == sum(line["seconds"] for line in metrics if "seconds" in line)
        assert cell["peak_bytes"] > 2**20
        assert cell["saved_bytes"] > 4 * cell["parameters"]["trainable"]  # and the file's header
        assert ("expert_load" in cell) == (unit.method == "hycam")
    assert record["planned"] == 4 and len(record["versions"]) == len(record["devices"]) == 1
    assert record["data"]["0"]["colours"]["rows"]["all"] == 40
    assert load_study(str(study.output_path)) == study


def test_a_test_metric_that_is_not_finite_stops_no_study(study: Study, tmp_path: Path) -> None:
    """A run writes it as null; the record, the next call's check of the folder and the tables go on."""
    copied = tmp_path / "study"
    shutil.copytree(study.output_path, copied)
    study = load_study(str(copied))
    path = run_folder(study, cells(study)[2]) / "results.json"
    results = json.loads(path.read_text())
    results["test"]["adapted"]["overall"] |= {"nll": None, "perplexity": None}
    path.write_text(json.dumps(results))
    assert main(["compare", str(copied)]) == 0
    numbers = _record(study)["cells"][2]["test"]["overall"]
    assert (numbers["nll"], numbers["perplexity"], numbers["loss"]) == (None, None, None) and numbers["tokens"] > 0
    assert "lora on tiny, fold 0, seed 1: PPL is not finite" in (copied / "tables/tables.md").read_text()


_DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "a list": lambda content: b"[]",
    "an object": lambda content: b"{}",
    "cut": lambda content: content[: len(content) // 2],
}


@pytest.mark.parametrize("damage", _DAMAGES)
@pytest.mark.parametrize(
    "file",
    [
        "cells/tiny/lora/fold0-seed0/results.json",
        "cells/tiny/lora/fold0-seed0/metrics.jsonl",
        "cells/tiny/lora/fold0-seed0/run.json",
        "tuning/tiny/lora/lr-0.001/results.json",
        "work/cells/tiny/lora/fold0-seed0.failed",
    ],
)
def test_a_damaged_file_of_a_study_is_named(
    study: Study, tmp_path: Path, file: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "study"
    shutil.copytree(study.output_path, copied)
    path = copied / file
    if path.suffix == ".failed":
        (copied / "cells/tiny/lora/fold0-seed0/results.json").unlink()
        path.write_text('{"error": "a fault", "time": 1.0}')
    path.write_bytes(_DAMAGES[damage](path.read_bytes()))
    with pytest.raises(InputError) as refusal:
        collect(load_study(str(copied)))
    assert str(refusal.value).startswith(str(path))
    assert main(["compare", str(copied)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"hycam: error: {refusal.value}"


@pytest.mark.parametrize("damage", _DAMAGES)
def test_damaged_weights_of_a_study_are_named(tmp_path: Path, backbone: Path, damage: str) -> None:
    sections = scratch_backbone(tmp_path)
    study = _study(tmp_path, backbone, backbones={"tiny": sections}, methods=_ONE_METHOD, seeds=[0], reference="lora")
    path = study.output_path / "backbones/tiny/backbone-of-another-recipe/training.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(_DAMAGES[damage](b'{"settings": {}, "seed": 0}'))
    with pytest.raises(InputError, match=f"{path}: .*; delete {path.parent} to have it trained again"):
        is_done(study, Unit("tiny"))


def test_the_rate_with_the_lowest_validation_loss_is_taken(study: Study) -> None:
    record = _record(study)
    tried = {entry["learning_rate"]: entry for entry in record["tuning"]}
    assert [entry["status"] for entry in tried.values()] == ["done", "done", "diverged"]
    assert "not finite" in tried[1e30]["error"] or "loss is" in tried[1e30]["error"]
    best = min((1e-3, 1e-2), key=lambda rate: tried[rate]["validation_loss"])
    assert {cell["learning_rate"] for cell in record["cells"] if cell["method"] == "lora"} == {best}
    for unit in tuning(study)[:2]:
        results = json.loads((run_folder(study, unit) / "results.json").read_text())
        assert "test" not in results
        overall = results["untested"]["overall"]
        assert tried[unit.tried_rate]["validation_loss"] == overall["nll"] / overall["tokens"]


def test_a_rate_is_chosen_on_rows_that_no_fold_tests(tmp_path: Path, backbone: Path) -> None:
    """Fold 4 tests bin 0, on which fold 0 validates too: the answers there change the choice by nothing."""
    results = []
    for name in ("before", "after"):
        study = _study(tmp_path / name, backbone)
        if name == "after":
            _change_answers(Path(study.tasks[0]["source"]), fold=4)
        # validated once, so that the answers don't choose the step either
        trainer = {"eval_steps": 4, "save_steps": 4}
        recipe = study.recipe("tiny", "lora", fold=0, seed=0, learning_rate=1e-2, folder=name)
        recipe.trainer |= trainer
        recipe.output_dir = str(tmp_path / name / "run")
        results.append(train(recipe, test=False)["untested"])
        assert results[-1]["overall"]["tokens"] > 0
    assert results[0] == results[1]


def _change_answers(path: Path, fold: int) -> None:
    """Give the rows that a fold tests other answers."""
    values = [json.loads(line) for line in path.read_text().splitlines()]
    tested = [row for row in values if part_of(row["instruction"], row["input"], fold) == "test"]
    assert tested and all(part_of(row["instruction"], row["input"], 0) == "validation" for row in tested)
    for row in tested:
        row["output"] = "something else"
    save_rows(path, values)


def test_the_tuned_run_becomes_the_first_cell(study: Study, tmp_path: Path) -> None:
    """It is what a run of that recipe from the start gives, and no checkpoint or tried adapter is left."""
    cell = Unit("tiny", "lora", 0, 0)
    recipe = study.recipe("tiny", "lora", fold=0, seed=0, learning_rate=1e-2, folder=cell.folder)
    recipe.output_dir = str(tmp_path / "run")
    straight = train(recipe)
    results = json.loads((run_folder(study, cell) / "results.json").read_text())
    assert results["test"] == straight["test"]
    assert logged_numbers(run_folder(study, cell)) == logged_numbers(recipe.output_path)
    assert not list(study.output_path.rglob("checkpoint-*"))
    assert len(list(study.output_path.glob("cells/*/*/*/adapter"))) == 4
    assert not list(study.output_path.glob("tuning/*/*/*/adapter"))


def test_finished_cells_are_not_run_again(study: Study) -> None:
    before = _content(study.output_path / "cells") | _content(study.output_path / "tuning")
    lines: list[str] = []
    compare(study, lines.append)
    assert not lines
    assert _content(study.output_path / "cells") | _content(study.output_path / "tuning") == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("trainer.max_steps", "8"), r"tuning/tiny/lora/lr-0\.001: .*other values of trainer\.max_steps"),
        (("methods.hycam.r", "4"), r"cells/tiny/hycam/fold0-seed0: .*other values of method\.r"),
        (("methods.hycam.learning_rates", "[1e-3, 1e-2]"), "cells/tiny/hycam/fold0-seed0: .*has not yet"),
        (("evaluation", "{batch_size: 2}"), r"other values of evaluation\.batch_size"),
    ],
)
def test_cells_of_another_recipe_are_refused_by_name(study: Study, change: tuple[str, str], named: str) -> None:
    before = _content(study.output_path)
    with pytest.raises(InputError, match=named):
        compare(load_study(str(study.output_path), [change]))
    assert _content(study.output_path) == before


def test_other_rows_are_refused_by_name(study: Study, tmp_path: Path) -> None:
    run = run_folder(study, cells(study)[-1]) / "run.json"
    kept = run.read_text()
    values = json.loads(kept)
    values["data"]["animals"]["sha256"] = "0" * 64
    run.write_text(json.dumps(values))
    try:
        with pytest.raises(InputError, match="hycam/fold0-seed1: the rows of animals"):
            compare(study)
    finally:
        run.write_text(kept)


def test_a_failed_cell_is_reported_and_tried_again(
    tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = _study(
        tmp_path, backbone, methods=_ONE_METHOD | {"wide": {"name": "lora", "r": 4}}, seeds=[0], reference="lora"
    )
    recipe = str(tmp_path / "tiny.yaml")
    (tmp_path / "animals.jsonl").rename(tmp_path / "elsewhere.jsonl")
    assert main(["compare", recipe]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("failed: ") == 2
    assert captured.err.splitlines()[-1] == (
        "hycam: error: 2 of 2 cells failed, the next call tries again: tiny/lora/fold0-seed0, tiny/wide/fold0-seed0"
    )
    errors = {cell["method"]: cell["error"] for cell in _record(study)["cells"] if cell["status"] == "failed"}
    assert errors.keys() == {"lora", "wide"}
    assert errors["lora"].endswith("animals.jsonl: can't be read: No such file or directory")
    (tmp_path / "elsewhere.jsonl").rename(tmp_path / "animals.jsonl")
    assert main(["compare", recipe]) == 0
    assert [cell["status"] for cell in _record(study)["cells"]] == ["done", "done"]


def test_what_needs_a_failed_backbone_fails_with_its_reason(tmp_path: Path, backbone: Path) -> None:
    sections = scratch_backbone(tmp_path, batch_size=5000)
    study = _study(tmp_path, backbone, backbones={"tiny": sections}, methods=_ONE_METHOD, seeds=[0], reference="lora")
    record = compare(study, lambda line: None)
    (cell,) = record["cells"]
    assert cell["error"].startswith("it needs backbones/tiny, which failed: backbone.scratch: corpus: ")


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_study_goes_on(tmp_path: Path, backbone: Path, number: signal.Signals) -> None:
    """Whatever ends the process, its worker saves and stops, and the next call resumes the run where it was."""
    long = {"max_steps": 80, "eval_steps": 10, "save_steps": 10}
    study = _study(tmp_path, backbone, methods=_ONE_METHOD, seeds=[0], trainer=long, reference="lora")
    unit = cells(study)[0]
    folder, lock = run_folder(study, unit), lock_file(study, unit.folder)
    process = _started(_call_main, ["compare", str(tmp_path / "tiny.yaml")])
    _wait(lambda: list(folder.glob("checkpoint-*")) or not process.is_alive())
    assert process.pid is not None and process.is_alive()
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == (-number if number == signal.SIGKILL else 128 + number)
    _wait(lambda: not is_claimed(lock))
    assert list(folder.glob("checkpoint-*")) and not is_done(study, unit)
    compare(study, lambda line: None)
    log = (study.output_path / "work" / f"{unit.folder}.log").read_text()
    assert "going on from" in log
    recipe = study.recipe("tiny", "lora", fold=0, seed=0, learning_rate=1e-2, folder=unit.folder)
    recipe.output_dir = str(tmp_path / "straight")
    train(recipe)
    assert logged_numbers(folder) == logged_numbers(recipe.output_path)


def test_processes_share_the_work(tmp_path: Path, backbone: Path) -> None:
    """Each unit is done by one of them; what a third process has claimed, they leave to it and wait for."""
    methods = {"lora": {"name": "lora", "r": 2, "learning_rates": [1e-3, 1e-2]}}
    study = _study(tmp_path, backbone, methods=methods, seeds=[0, 1, 2], reference="lora")
    outputs = [tmp_path / "first.txt", tmp_path / "second.txt"]
    claimed = cells(study)[-1]
    with claim(lock_file(study, claimed.folder)) as own:
        assert own
        processes = [_started(_write_lines, study, output) for output in outputs]
        _wait(lambda: all(is_done(study, unit) for unit in units(study) if unit != claimed))
        time.sleep(0.5)
        assert not is_done(study, claimed) and not run_folder(study, claimed).exists()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    lines = [output.read_text().splitlines() for output in outputs]
    done = [line.partition("] ")[2].partition(":")[0] for own_lines in lines for line in own_lines]
    assert sorted(done) == sorted(unit.folder for unit in units(study))
    assert all(lines)


def test_a_folder_takes_one_study_at_a_time(study: Study) -> None:
    """Units may be added between calls, but not while another process works by the study that it has read."""
    before = _content(study.output_path)
    added = load_study(str(study.output_path), [("seeds", "[0, 1, 2]")])
    with claim(lock_file(study, "session"), shared=True):
        with pytest.raises(InputError, match=r"study.yaml: another process works on it with other values of seeds"):
            compare(added)
        compare(study, lambda line: None)
    assert {name: content for name, (_, content) in _content(study.output_path).items()} == {
        name: content for name, (_, content) in before.items()
    }


def test_every_method_sees_the_same_batches(tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, labels, order and number of steps, over more than an epoch."""
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []
    step = HyCAMTrainer.training_step

    def recorded(self: HyCAMTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        batches.append((inputs["input_ids"].clone(), inputs["labels"].clone()))
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(HyCAMTrainer, "training_step", recorded)
    methods = {
        "full": {"name": "full"},
        "lora": {"name": "lora", "r": 2},
        "riemoe": {"name": "riemoe", "r": 2},
        "hycam": {"r": 2},
        "released_code": {"preset": "released_code", "r": 2, "data": {"train_on_prompt": True}},
    }
    steps = {"max_steps": 15, "eval_steps": 15, "save_steps": 15, "logging_steps": 10}
    study = _study(tmp_path, backbone, methods=methods, trainer=steps, tasks=[
        {"name": "colours", "source": str(save_rows(tmp_path / "colours.jsonl", rows(60)))}
    ])  # fmt: skip
    seen = {}
    for method in methods:
        recipe = study.recipe("tiny", method, fold=0, seed=1, learning_rate=1e-3, folder=method)
        train(recipe, test=False)
        timed = [line["step"] for line in read_metrics(recipe.output_path / "metrics.jsonl") if "seconds" in line]
        assert timed == [10, 15]  # no step is left out of the time, those after the last log neither
        seen[method], batches = batches[:], batches
        batches.clear()
    reference = seen.pop("full")
    assert len(reference) == 15
    assert len({row for inputs, _ in reference[:10] for row in map(str, inputs.tolist())}) > 20
    for method, other in seen.items():
        for (inputs, labels), (other_inputs, other_labels) in zip(reference, other, strict=True):
            assert torch.equal(inputs, other_inputs)
            if method != "released_code":
                assert torch.equal(labels, other_labels)


def test_the_backbone_alone_is_measured_as_the_study_has_it(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method may have the backbone in a dtype of its own, which moves its perplexities a little."""
    monkeypatch.setattr("hycam.reporting.report.draw_figure", lambda path: [])
    methods = {"full": {"name": "full", "backbone": {"dtype": "bfloat16"}}, **_ONE_METHOD}
    methods["late"] = methods["full"]
    study = _study(tmp_path, backbone, methods=methods, reference="lora", seeds=[0])
    record = compare(study, lambda line: None)
    recipes = [load_recipe(str(run_folder(study, unit))) for unit in cells(study)]
    assert [recipe.backbone.dtype for recipe in recipes] == ["bfloat16", "auto", "bfloat16"]
    first, lora, late = (cell["base"]["overall"]["perplexity"] for cell in record["cells"])
    assert first == pytest.approx(lora, rel=1e-2) and first != lora
    assert late == lora
    (table,) = (table for table in study_tables(record) if table.name == "table2")
    assert shown(table.rows[0].cells[1]) == f"{lora:.3f}" != f"{first:.3f}"

    text = save_rows(tmp_path / "text.jsonl", [{"text": row["output"] * 3} for row in rows(8)])
    write_report(study.output_path, tmp_path / "report", texts=text, announce=lambda line: None)
    alone = json.loads((tmp_path / "report/data/forgetting.json").read_text())["tiny"]["value"]
    run = RunFolder(run_folder(study, cells(study)[1]), study.output_path / "backbones")
    assert alone == measure_text(run, [row["output"] * 3 for row in rows(8)], adapted=False)
    # the only runs left have a dtype of their own: what was kept stays
    shutil.rmtree(run.path)
    said: list[str] = []
    write_report(study.output_path, tmp_path / "report", texts=text, announce=said.append)
    assert said == []
    assert json.loads((tmp_path / "report/data/forgetting.json").read_text())["tiny"]["value"] == alone


def test_a_loss_on_prompts_is_measured_on_responses(tmp_path: Path, backbone: Path) -> None:
    """Perplexities of one test split compare: the base model's is the same whatever the training's loss is on."""
    methods = {"hycam": {"r": 2}, "prompted": {"r": 2, "data": {"train_on_prompt": True}}}
    study = _study(tmp_path, backbone, methods=methods, seeds=[0])
    results = [
        train(study.recipe("tiny", method, fold=0, seed=0, learning_rate=1e-3, folder=method)) for method in methods
    ]
    assert results[0]["test"]["base"] == results[1]["test"]["base"]
    assert results[0]["test"]["adapted"] != results[1]["test"]["adapted"]


def test_a_launcher_of_several_processes_is_refused(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_study(tmp_path, study_values(tmp_path, backbone))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["compare", str(path)]) == 2
    assert "one process per GPU" in capsys.readouterr().err


def test_several_gpus_need_a_process_each(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_study(tmp_path, study_values(tmp_path, backbone, trainer={"use_cpu": False}))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["compare", str(path)]) == 2
    wanted = f"one process sees 2 GPUs, wanted a process for each: CUDA_VISIBLE_DEVICES=N hycam compare {path}"
    assert wanted in capsys.readouterr().err
    assert not (tmp_path / "study").exists()
