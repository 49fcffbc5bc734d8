"""`write_report`: what it measures, what it keeps, and that records alone give the same files."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import hycam.reporting.runs as runs
from hycam.data.tokenization import tokenize_dataset
from hycam.errors import InputError
from hycam.reporting import records
from hycam.reporting.report import Report, write_report
from hycam.study.recipe import Study
from tests.reporting.studies import CELLS, FIGURES, TEXTS


def report(study: Path, *, texts: bool = True, output: Path | None = None, **options: Any) -> tuple[Report, list[str]]:
    """The report, and what was measured for it."""
    said: list[str] = []
    path = study / "text.jsonl" if texts else None
    made = write_report(study, output or study / "report", texts=path, announce=said.append, **options)
    return made, [line.removeprefix("measuring ") for line in said]


@pytest.fixture(scope="module")
def first(finished: Study, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report, list[str]]:
    """The folder of a first report, what it returned and what it measured."""
    folder = tmp_path_factory.mktemp("first") / "study"
    shutil.copytree(finished.output_path, folder)
    return folder, *report(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def table(study: Path, name: str) -> dict[str, Any]:
    tables = json.loads((study / "report/tables/tables.json").read_text())
    return next(table for table in tables if table["name"] == name)


def no_model(*arguments: Any) -> None:
    raise AssertionError("a model was loaded")


def test_it_measures_each_thing_once_and_writes_every_figure(first: tuple[Path, Report, list[str]]) -> None:
    folder, made, said = first
    assert made.missing == []
    cells = [f"cells/tiny/{method}/fold0-seed{seed}" for method, seed in CELLS]
    assert sorted(said) == sorted(
        [
            "tokens: tiny/fold0",
            "forgetting: tiny",
            *(f"forgetting: {cell}" for cell in cells),
            "value_states: cells/tiny/hycam/fold0-seed0",
            "modulation: cells/tiny/hycam/fold0-seed0",
        ]
    )
    names = [f"{name}.{suffix}" for name in FIGURES for suffix in ("json", "png", "svg")]
    assert sorted(path.name for path in (folder / "report/figures").iterdir()) == sorted(names)
    assert {path.name for path in (folder / "report/tables").iterdir()} == {"tables.md", "tables.tex", "tables.json"}
    assert {str(path) for path in made.files} == {
        str(path) for kind in ("figures", "tables") for path in (folder / "report" / kind).iterdir()
    }


def test_the_forgetting_is_the_perplexity_of_the_loaded_models(first: tuple[Path, Report, list[str]]) -> None:
    """Each model loaded by its own library, a text at a time; the texts fit into one window."""
    folder, _, _ = first
    backbone = json.loads((folder / "study.json").read_text())["study"]["backbones"]["tiny"]["name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    rows = {row["cells"][0]: row["cells"] for row in table(folder, "forgetting")["rows"]}
    assert list(rows) == ["full", "lora", "hycam", "three"]

    def perplexity(model: torch.nn.Module) -> float:
        nll = tokens = 0.0
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            assert 2 < ids.shape[1] <= 64
            with torch.no_grad():
                nll += model.eval()(ids, labels=ids).loss.double().item() * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
        return math.exp(nll / tokens)

    base = perplexity(AutoModelForCausalLM.from_pretrained(backbone))
    seeds = {"full": [0], "lora": [0], "hycam": [0, 1], "three": [0]}
    for method, (_, before, after, change, count) in rows.items():
        values = []
        for seed in seeds[method]:
            cell = folder / f"cells/tiny/{method}/fold0-seed{seed}"
            if method == "full":
                model = AutoModelForCausalLM.from_pretrained(cell / "model")
            else:
                model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(backbone), cell / "adapter")
            values.append(perplexity(model))
        mean = sum(values) / len(values)
        assert before["value"] == pytest.approx(base, rel=1e-5)
        assert after["value"] == pytest.approx(mean, rel=1e-5)
        assert abs(mean / base - 1) > 1e-4, "training moved it"
        assert change["value"] == pytest.approx(100 * (mean / base - 1), abs=1e-3)
        assert (after["std"] is None, count) == (len(values) == 1, str(len(values)))


def test_models_are_measured_in_the_precision_that_they_were_trained_in(
    first: tuple[Path, Report, list[str]],
) -> None:
    run = runs.RunFolder(first[0] / "cells/tiny/hycam/fold0-seed0", first[0] / "backbones")
    model = run.model()
    run.recipe.trainer["bf16"] = True
    seen = []
    model.get_submodule("base_model.model.lm_head").register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    runs.measure_value_states(run, model)
    runs.measure_modulation(run, model)
    assert seen
    assert set(seen) == {torch.bfloat16}


def test_the_tokens_of_streams_are_left_out(
    first: tuple[Path, Report, list[str]], tmp_path: Path, undrawn: None
) -> None:
    folder = tmp_path / "study"
    shutil.copytree(first[0], folder)
    for method, seed in CELLS:
        record = folder / f"cells/tiny/{method}/fold0-seed{seed}/recipe.yaml"
        record.write_text(record.read_text().replace("streaming: null", "streaming: {shuffle_buffer: 8}"))
        assert "streaming: {" in record.read_text()
    made, said = report(folder, texts=False)
    assert "tokens of tiny/fold0: data.streaming keeps no rows to count them in" in made.missing
    assert not any("tokens" in line for line in said)


def test_text_is_hidden_on_request(first: tuple[Path, Report, list[str]], tmp_path: Path) -> None:
    folder, _, _ = first
    shutil.copytree(folder / "report", tmp_path / "report")
    _, said = report(folder, output=tmp_path / "report", hide_text=True)
    assert said == ["modulation: cells/tiny/hycam/fold0-seed0"], "the rest is as it was"
    figures = [
        json.loads((path / "figures/modulation-tiny.json").read_text())
        for path in (folder / "report", tmp_path / "report")
    ]
    for shown, hidden in zip(*(figure["tasks"].values() for figure in figures), strict=True):
        first_label = int(hidden["tokens"][0])
        assert hidden["tokens"] == [f"{first_label + i:+d}" for i in range(len(shown["tokens"]))]
        assert first_label < 0 and hidden["layers"] == shown["layers"]


def test_text_is_hidden_without_the_runs_too(
    first: tuple[Path, Report, list[str]], tmp_path: Path, undrawn: None
) -> None:
    """What was kept with the text is relabelled, and left out where the tokens' places aren't known."""
    folder, _, _ = first
    shutil.copy(folder / "study.json", tmp_path)
    shutil.copytree(folder / "report/data", tmp_path / "report/data")
    made, _ = report(tmp_path, texts=False, hide_text=True)
    assert made.missing == []
    shown, hidden = (
        json.loads((path / "report/figures/modulation-tiny.json").read_text())["tasks"] for path in (folder, tmp_path)
    )
    for task, values in hidden.items():
        assert values["first"] == -6
        assert values["tokens"] == [f"{place:+d}" for place in range(-6, len(values["tokens"]) - 6)]
        assert values["layers"] == shown[task]["layers"]
    kept = json.loads((tmp_path / "report/data/modulation.json").read_text())
    for task in kept["cells/tiny/hycam/fold0-seed0"]["value"]["tasks"].values():
        del task["first"]
    (tmp_path / "report/data/modulation.json").write_text(json.dumps(kept))
    shutil.rmtree(tmp_path / "report/figures")
    made, _ = report(tmp_path, texts=False, hide_text=True)
    assert [line.split(":")[0] for line in made.missing] == ["modulation of cells/tiny/hycam/fold0-seed0"]
    assert not (tmp_path / "report/figures/modulation-tiny.json").exists()


def test_table_1_and_routing(first: tuple[Path, Report, list[str]]) -> None:
    folder, _, _ = first
    data = table(folder, "table1")
    assert [row["cells"][0] for row in data["rows"]] == ["colours", "animals"]
    assert [row["cells"][1]["value"] for row in data["rows"]] == [40, 30]
    columns = {name: [row["cells"][index] for row in data["rows"]] for index, name in enumerate(data["columns"])}
    assert all(
        0 < mean["value"] <= most["value"]
        for mean, most in zip(columns["prompt, mean"], columns["prompt, max"], strict=True)
    )
    run = runs.RunFolder(folder / "cells/tiny/hycam/fold0-seed0", folder / "none")
    for task, total, of_row in zip(columns["task"], columns["tokens"], columns["tokens per row"], strict=True):
        tokens = tokenize_dataset(run.rows[task].split("all"), run.tokenizer, run.recipe.data, 0).dataset["input_ids"]
        assert total["value"] == pytest.approx(sum(map(len, tokens)))
        assert of_row["value"] == pytest.approx(sum(map(len, tokens)) / len(tokens))
    assert columns["source"] == ["colours.jsonl", "animals.jsonl"] and columns["domain"] == [None, None]
    routing = table(folder, "routing")
    assert [row["cells"][0] for row in routing["rows"]] == ["hycam", "three"]
    maxima = [row["cells"][3]["value"] for row in routing["rows"]]
    assert all(0 < maximum <= math.log(2) for maximum in maxima)
    assert [row["cells"][-1] for row in routing["rows"]] == ["2", "1"]
    kept = json.loads((folder / "report/data/tokens.json").read_text())["tiny/fold0"]["value"]["tasks"]
    shares = [task["test_tokens"] / sum(other["test_tokens"] for other in kept.values()) for task in kept.values()]
    assert maxima[0] == pytest.approx(-sum(share * math.log(share) for share in shares))
    text = (folder / "report/tables/tables.md").read_text()
    assert all(f"## {title}" in text for title in ("Methods and backbones", "Data", "Routing specialisation"))


def test_the_curves_are_those_of_the_runs(first: tuple[Path, Report, list[str]]) -> None:
    folder, _, _ = first
    curves = json.loads((folder / "report/figures/loss_curves-tiny.json").read_text())["curves"]
    assert list(curves) == ["full", "lora", "hycam", "three"]
    losses = []
    for seed in (0, 1):
        lines = (folder / f"cells/tiny/hycam/fold0-seed{seed}/metrics.jsonl").read_text().splitlines()
        losses.append({line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line})
    training = curves["hycam"]["training"]
    assert training["step"] == [1, 2, 3, 4]
    for step, mean, std in zip(training["step"], training["mean"], training["std"], strict=True):
        one, two = (of_run[step] for of_run in losses)
        assert mean == pytest.approx((one + two) / 2)
        assert std == pytest.approx(abs(one - two) / math.sqrt(2))
    assert curves["lora"]["training"]["std"] == [None] * 4
    points = json.loads((folder / "report/figures/sweep-tiny.json").read_text())["points"]
    assert [point["value"] for point in points] == [2, 3]


def test_a_second_report_measures_nothing_and_gives_the_same_files(
    first: tuple[Path, Report, list[str]], undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = first
    before = contents(folder / "report")
    monkeypatch.setattr(runs, "load_selected_model", no_model)
    assert report(folder)[1] == []
    assert contents(folder / "report") == before


def test_records_alone_give_the_same_files(
    first: tuple[Path, Report, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From study.json and the measurements, without a run, a model or a tokenizer."""
    folder, _, _ = first
    shutil.copy(folder / "study.json", tmp_path)
    shutil.copytree(folder / "report/data", tmp_path / "report/data")
    monkeypatch.setattr(runs, "load_selected_model", no_model)
    monkeypatch.setattr(runs, "load_selected_tokenizer", no_model)
    made, said = report(tmp_path, texts=False)
    assert (made.missing, said) == ([], [])
    assert contents(tmp_path / "report") == contents(folder / "report")


def test_without_measurements_it_says_what_is_left_out(study: Path, undrawn: None) -> None:
    shutil.rmtree(study / "cells")
    made, said = report(study, texts=False)
    assert said == []
    assert [line.split(":")[0] for line in made.missing] == [
        "tokens of tiny/fold0",
        "forgetting of tiny",
        "value_states of cells/tiny/hycam/fold0-seed0",
        "modulation of cells/tiny/hycam/fold0-seed0",
    ]
    drawn = {path.stem for path in (study / "report/figures").iterdir()}
    assert drawn == {name for name in FIGURES if "value" not in name and "modulation" not in name}
    names = [made["name"] for made in json.loads((study / "report/tables/tables.json").read_text())]
    assert "table2" in names and not {"table1", "forgetting", "routing"} & set(names)


def test_what_changed_is_measured_again(first: tuple[Path, Report, list[str]], study: Path, undrawn: None) -> None:
    folder, _, _ = first
    shutil.copytree(folder / "report", study / "report")
    old = (study / "report/data/forgetting.json").read_text()
    assert report(study)[1] == [], "another folder is no other study"
    cell = "cells/tiny/lora/fold0-seed0"
    results = json.loads((study / cell / "results.json").read_text())
    results["test"]["adapted"]["overall"]["nll"] += 1
    (study / cell / "results.json").write_text(json.dumps(results))
    assert report(study)[1] == [f"forgetting: {cell}"]
    with (study / "text.jsonl").open("a") as file:
        file.write('{"text": "One more of it."}\n')
    assert len(report(study)[1]) == 1 + len(CELLS)
    assert (study / "report/data/forgetting.json").read_text() != old


def test_weights_that_are_gone_are_named(study: Path, undrawn: None) -> None:
    shutil.rmtree(study / "cells/tiny/full/fold0-seed0/model")
    made, _ = report(study)
    assert made.missing == ["forgetting of cells/tiny/full/fold0-seed0: its run is not there, or its weights are not"]
    assert [row["cells"][0] for row in table(study, "forgetting")["rows"]] == ["lora", "hycam", "three"]


def test_measurements_on_another_text_stand_in_no_table(study: Path, undrawn: None) -> None:
    """A run whose weights are gone keeps what it had on the text of before."""
    report(study)
    shutil.rmtree(study / "cells/tiny/full/fold0-seed0")
    with (study / "text.jsonl").open("a") as file:
        file.write('{"text": "One more of it."}\n')
    for texts in (True, False):
        made, _ = report(study, texts=texts)
        assert made.missing == ["forgetting of cells/tiny/full/fold0-seed0: measured on another text"]
        assert [row["cells"][0] for row in table(study, "forgetting")["rows"]] == ["lora", "hycam", "three"]


def test_a_study_that_was_moved_finds_the_backbone_that_it_trained(study: Path) -> None:
    """Its runs name the folder where it was."""
    name = json.loads((study / "study.json").read_text())["study"]["backbones"]["tiny"]["name_or_path"]
    shutil.copytree(name, study / "backbones/tiny/backbone-1")
    cell = study / "cells/tiny/lora/fold0-seed0"
    text = (cell / "recipe.yaml").read_text()
    (cell / "recipe.yaml").write_text(text.replace(name, "elsewhere/backbones/tiny/backbone-1"))
    run = runs.RunFolder(cell, study / "backbones/tiny")
    assert run.recipe.backbone.name_or_path == str(study / "backbones/tiny/backbone-1")
    assert run.model().config.hidden_size == 32


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (lambda study: (study / "study.json").unlink(), r"study: no study\.json, wanted the folder of a study"),
        (lambda study: (study / "study.json").write_text("{"), r"study\.json: can't be read"),
        (
            lambda study: (study / "study.json").write_text(
                json.dumps(dict.fromkeys(records.RECORD_KEYS) | {"cells": [{"status": "failed"}]})
            ),
            r"study\.json: no finished cell",
        ),
        (
            lambda study: (study / "study.json").write_text(
                json.dumps(dict.fromkeys(records.RECORD_KEYS) | {"cells": [], "format_version": 2})
            ),
            r"study\.json: format_version: got 2, which a later version wrote",
        ),
        (lambda study: (study / "study.json").write_text("[]"), r"study\.json: damaged: got a list, wanted an object"),
        (lambda study: (study / "study.json").write_text('{"cells": []}'), r"study\.json: damaged: study, .* missing"),
        (lambda study: shutil.rmtree(study / "cells"), r"--text: .*study has no run to measure"),
        (lambda study: (study / "text.jsonl").write_text('{"txt": 1}'), r"text\.jsonl:1: text: None given"),
        (lambda study: keep(study, "{"), r"tokens\.json: no kept measurements"),
        (lambda study: keep(study, '{"a": {"inputs": 1}}'), r"tokens\.json: an entry lacks inputs or value"),
        (lambda study: keep(study, "[]"), r"tokens\.json: no kept measurements"),
    ],
)
def test_wrong_input_is_named(study: Path, break_: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "load_selected_model", no_model)
    break_(study)
    with pytest.raises(InputError, match=message):
        report(study)


def keep(study: Path, text: str) -> None:
    (study / "report/data").mkdir(parents=True)
    (study / "report/data/tokens.json").write_text(text)
