"""The page's numbers are those of the committed records, and nothing stands in a measured table that is in none."""

import json
import re
import shutil
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch

from benchmarks import tables as command
from benchmarks.cpu import measure, measure_calls, measure_models, measure_profiles, measure_sweep, measure_targets
from benchmarks.harness import plots
from benchmarks.harness.pages import NOT_MEASURED, fill
from benchmarks.harness.record import environment
from benchmarks.harness.tables import TABLES, render
from benchmarks.models.backbones import ModelShape
from benchmarks.op.floor import PRODUCTS, measure_products
from benchmarks.op.shapes import Shape
from benchmarks.tables import PAGES, RESULTS, main
from tests.benchmarks.fakes import make_session

EMPTY = "before\n<!-- table: cpu-op -->\nold\n<!-- end -->\n<!-- table: gpu-op -->\n<!-- end -->\nafter\n"


def filled(page, results):
    return fill(page, lambda name: render(name, results))


def test_the_pages_are_what_the_records_say():
    """Their plots too."""
    assert main(["--check"]) == 0


def test_the_pages_show_every_table_once():
    names = [name for page in PAGES for name in re.findall(r"<!-- table: ([\w-]+) -->", page.read_text())]
    assert sorted(set(names) & set(TABLES)) == sorted(TABLES)
    assert len([name for name in names if name in TABLES]) == len(TABLES)


def test_committed_records_are_of_clean_known_sources():
    for path in RESULTS.glob("*/*.json"):
        record = json.loads(path.read_text())
        assert record["git"]["commit"], path
        assert record["git"]["dirty"] is False, path
        assert (record["gpu"] is None) == (path.parent.name in ("builds", "cpu", "versions")), path
        if record["gpu"]:
            assert record["phases"]["tests"] == "passed", path


def test_without_a_record_a_table_says_so(tmp_path):
    assert filled(EMPTY, tmp_path).count(NOT_MEASURED) == 2


def test_a_changed_page_is_found(tmp_path, monkeypatch, capsys):
    page = tmp_path / "performance.md"
    page.write_text(EMPTY)
    monkeypatch.setattr(command, "PAGES", (page,))
    monkeypatch.setattr(command, "PLOTS", tmp_path / "plots")
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    assert main(["--check"]) == 1
    assert page.read_text() == EMPTY
    assert "python -m benchmarks.tables" in capsys.readouterr().err
    assert main([]) == 0
    assert main(["--check"]) == 0


@pytest.fixture(scope="module")
def cpu_record(tmp_path_factory):
    """A CPU record as `benchmarks.cpu` measures it, with times of a fake clock."""
    session = make_session(tmp_path_factory.mktemp("record") / "r.json", rounds=3)
    session.record.content = environment() | session.record.content | {"git": {"commit": "f" * 40, "dirty": False}}
    shape = Shape(40, 32, num_experts=3, rank=8)
    measure(session, [shape], copy_bytes=1 << 10, paper_peers=("eager", "torch", "torch-recompute"))
    measure_calls(session)
    measure_sweep(session, [Shape(20, 32, 3, 8), Shape(40, 16, 3, 8)], copy_bytes=1 << 10)
    measure_products(session, shape, torch.float32, 1, (PRODUCTS, "torch"), seconds=1)
    models = [ModelShape("tiny-llama", 1, 16, num_experts=2, rank=4)]
    measure_models(
        session, models, models, replace(models[0], layers=4), longest_methods=("hycam-torch",), trained=models[:1]
    )
    measure_profiles(session, [shape], models)
    measure_targets(session, models[0], ("lora",))
    return session.record.path


@pytest.fixture
def results(cpu_record, tmp_path):
    folder = tmp_path / "results" / "cpu"
    folder.mkdir(parents=True)
    shutil.copy(cpu_record, folder / "2026-01-01.json")
    return tmp_path / "results"


def test_every_number_is_traceable_to_the_record(results):
    path = results / "cpu" / "2026-01-01.json"
    record = json.loads(path.read_text())
    for entry in record["entries"]:
        if entry.get("peer") == "torch" and "samples_us" in entry:
            entry["samples_us"] = [4000.0, 8000.0, 6000.0]
    path.write_text(json.dumps(record))
    shown = filled(EMPTY, results)
    assert "| 40, 32 | float32 | both | torch | 6.0 | eager: 0.0 | 4000.00 [2000.00, 4000.00] | count |" in shown
    assert "`benchmarks/results/cpu/2026-01-01.json`" in shown
    assert "sources ffffffffffff (clean)" in shown
    assert shown.startswith("before\n")
    assert shown.endswith("after\n")


def test_every_cpu_table_is_filled_by_one_record(results):
    """What `benchmarks.cpu` measures is all that the page's CPU half shows."""
    names = [name for name in TABLES if name.startswith("cpu-")]
    page = "".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in names)
    shown = filled(page, results)
    assert NOT_MEASURED not in shown
    assert shown.count("From `benchmarks/results/cpu/2026-01-01.json`") == len(names)


def test_a_step_is_shown_with_its_tokens_and_bytes(results):
    path = results / "cpu" / "2026-01-01.json"
    record = json.loads(path.read_text())
    for entry in record["entries"]:
        if entry["group"] == "step" and entry["setting"] == "plain":
            entry["samples_us"] = {"frozen": [2e3] * 3, "lora": [4e3] * 3}.get(entry["peer"], [8e3] * 3)
        if entry.get("what") == "step" and entry["peer"] == "lora" and entry["setting"] == "plain":
            entry |= {"kept_bytes": 5_000_000, "peak_bytes": 7_000_000, "optimizer_bytes": 300_000}
    record["entries"].append(
        {"group": "step", "shape": {"model": "big", "batch": 8, "length": 1200}, "dtype": "float32",
         "setting": "plain", "peer": "full", "error": "OutOfMemoryError: CUDA out of memory"}
    )  # fmt: skip
    path.write_text(json.dumps(record))
    shown = render("cpu-steps", results)
    assert "| tiny-llama, 1 x 16 | float32 | plain | lora | 4000 | 2.00 | 5.0 | 7.0 | 0.3 |" in shown
    assert "| big, 8 x 1200 | float32 | plain | full | too little memory |" in shown


def test_what_the_op_and_a_token_consist_of_is_shown(results):
    rows = [line.split(" | ")[:4] for line in render("cpu-profile", results).splitlines() if line.startswith("| ")]
    op = [["| 40, 32", dtype, "both", peer] for dtype in ("float32", "bfloat16") for peer in ("products", "torch")]
    token = [["| tiny-llama, 1 x 16", "bfloat16", "token", peer] for peer in ("frozen", "hycam-torch")]
    assert rows[2:] == op + token


def test_parts_are_multiples_of_the_first_peers_call(results):
    """Round by round; the rest is what of the call no part holds, and the record beside it keeps the other tables."""
    record = json.loads((results / "cpu" / "2026-01-01.json").read_text())
    times = {
        "products": ([10.0, 20.0, 10.0], {"products": [9.0, 19.0, 9.0], "native": [0.0] * 3, "other": [0.5, 1.0, 0.5]}),
        "torch": ([15.0, 30.0, 15.0], {"products": [11.0, 22.0, 11.0], "native": [2.0, 4.0, 2.0], "other": [1.0] * 3}),
    }
    record["entries"] = [
        {"group": "profile", "shape": {"tokens": 40, "d": 32}, "dtype": "float32", "beside": list(times),
         "pass": "both", "peer": peer, "samples_us": call, "profiled_us": [1.1 * us for us in call], "parts_us": parts}
        for peer, (call, parts) in times.items()
    ]  # fmt: skip
    (results / "cpu" / "2026-03-01.json").write_text(json.dumps(record))
    shown = render("cpu-profile", results)
    assert "| 40, 32 | float32 | both | products | 1.00 [1.00, 1.00] | 0.90 | 0.00 | 0.05 | 0.05 | 1.10 |" in shown
    assert "| 40, 32 | float32 | both | torch | 1.50 [1.50, 1.50] | 1.10 | 0.20 | 0.10 | 0.10 | 1.10 |" in shown
    assert "2026-03-01" in shown
    names = [name for name in TABLES if name.startswith("cpu-") and name != "cpu-profile"]
    assert all("2026-01-01" in render(name, results) for name in names)


def test_target_logits_are_shown_beside_all(results):
    """Rates round by round of the tokens that each has, and where the first of the turn has none, no comparison."""
    path = results / "cpu" / "2026-01-01.json"
    record = json.loads(path.read_text())
    peers = {
        "all-logits": ([8e3, 6e3, 8e3], {"tokens": 80, "peak_bytes": 10_000_000, "loss": 4.0}),
        "target-logits": ([4e3, 4e3, 5e3], {"tokens": 80, "peak_bytes": 7_000_000, "loss": 4.00008}),
        "target-logits, grouped": ([4e3, 2e3, 2e3], {"tokens": 60, "peak_bytes": 6_000_000, "loss": 3.0}),
    }
    for entry in record["entries"]:
        if entry["group"] == "targets":
            entry["samples_us"] = peers[entry["peer"]][0]
        if entry.get("what") == "targets":
            loss = 3.0 if entry["peer"].endswith("grouped") else 4.0
            entry |= peers[entry["peer"]][1] | {"logits": 10, "all_logits_loss": loss}
    path.write_text(json.dumps(record))
    shown = render("cpu-targets", results)
    place = "| tiny-llama, 1 x 16 | bfloat16 | lora |"
    assert f"{place} all-logits | count | 10 | 10000 | 10.0 |  |  | 0e+00 |" in shown
    assert f"{place} target-logits | count | 10 | 20000 | 7.0 | 1.60 [1.50, 2.00] | 0.70 | 2e-05 |" in shown
    grouped = f"{place} target-logits, grouped | count | 10 | 30000 | 6.0 |"
    assert f"{grouped} 2.25 [1.50, 3.00] | 0.60 | 0e+00 |" in shown
    for entry in record["entries"]:
        if entry.get("peer") == "all-logits":
            entry.pop("samples_us", None)
    path.write_text(json.dumps(record))
    assert f"{place} target-logits | count | 10 | 20000 | 7.0 |  |  | 2e-05 |" in render("cpu-targets", results)


def test_the_newest_record_with_such_a_measurement_is_shown(results):
    """A record of models alone leaves the op's tables with theirs."""
    record = json.loads((results / "cpu" / "2026-01-01.json").read_text())
    record["entries"] = [entry for entry in record["entries"] if entry["group"] in ("step", "memory")]
    (results / "cpu" / "2026-03-01.json").write_text(json.dumps(record))
    assert "2026-03-01" in render("cpu-steps", results)
    assert "2026-01-01" in render("cpu-op", results)
    assert "2026-01-01" in render("cpu-memory", results)


def test_plots_are_drawn_from_the_record_and_carry_its_digest(results, tmp_path):
    path, folder = results / "cpu" / "2026-01-01.json", tmp_path / "plots"
    assert plots.outdated([path], folder)
    plots.redraw([path], folder)
    assert {file.name for file in folder.iterdir()} == {f"cpu-{name}.png" for name in ("forward", "backward", "both")}
    assert not plots.outdated([path], folder)
    shown = render("cpu-plots", results)
    assert all(f"(plots/{file.name})" in shown for file in folder.iterdir())
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"time": "later"}))
    assert plots.outdated([path], folder)
    plots.redraw([], folder)
    assert not list(folder.iterdir())


def test_a_plotted_share_is_the_floor_over_the_median(results):
    record = json.loads((results / "cpu" / "2026-01-01.json").read_text())
    floor = next(
        entry["floor_us"]
        for entry in record["entries"]
        if entry["group"] == "floor" and entry["shape"]["tokens"] == 20 and entry["pass"] == "both"
    )
    points = [point for point in plots.figures(record)["both"] if (point.series, point.tokens) == ("torch", 20)]
    assert [(point.d, point.share) for point in points] == [(32, pytest.approx(floor / 2.0))]  # samples 1, 2, 3 us


def test_a_plot_s_legend_is_beside_the_curves_and_its_axes_say_what_they_are(results, tmp_path, monkeypatch):
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(plots.plt, "close", drawn.append)
        plots.redraw([results / "cpu" / "2026-01-01.json"], tmp_path / "plots")
    assert len(drawn) == 3
    for figure in drawn:
        (legend,) = figure.legends
        assert len(legend.get_texts()) > 2
        assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)
        left, right = figure.axes
        assert left.get_ylabel() == "floor's time / measured time\n(1: as fast as the floor)"
        assert (left.get_xlabel()[:8], right.get_xlabel()[:10]) == ("tokens T", "features d")
        top = left.get_ylim()[1]
        assert all(max(line.get_ydata()) < 0.95 * top for axes in figure.axes for line in axes.lines), (
            "markers are whole"
        )
        plt.close(figure)


def test_the_newest_record_is_shown(results):
    shutil.copy(results / "cpu" / "2026-01-01.json", results / "cpu" / "2026-02-01.json")
    shown = filled(EMPTY, results)
    assert "2026-02-01.json" in shown
    assert "2026-01-01.json" not in shown


def test_a_gpu_record_is_shown_against_its_floor(results):
    header = environment() | {"git": {"commit": "e" * 40, "dirty": False}, "gpu": {"name": "a GPU"}}
    shape = {"tokens": 8, "d": 16}
    entries = [
        {"group": "floor", "shape": shape, "pass": "both", "floor_us": 100.0},
        {"group": "op", "shape": shape, "pass": "both", "peer": "fused", "method": "graph", "samples_us": [110.0] * 3},
        {"group": "op", "shape": shape, "pass": "both", "peer": "fused", "method": "events", "samples_us": [900.0] * 3},
        {"group": "op", "shape": shape, "peer": "eager", "wrong": "not timed"},
        {"group": "op", "shape": shape, "skipped": "0 s were left"},
    ]
    (results / "a-gpu").mkdir()
    (results / "a-gpu" / "r.json").write_text(json.dumps(header | {"entries": entries}))
    shown = filled(EMPTY, results)
    assert "| 8, 16 | both | fused | 110.0 [110.0, 110.0] | 100.0 | 1.10 |" in shown
    assert "900" not in shown
    assert "a GPU; torch" in shown
