import sys

import pytest
import torch
from matplotlib.image import imread

from hycam.analysis.plots import plot_expert_load, plot_loss_curves, plot_modulation
from hycam.analysis.run_plots import write_plots
from hycam.errors import InputError

METRICS = [
    {"step": 10, "loss": 4.0, "learning_rate": 1e-3},
    {"step": 20, "loss": 3.0},
    {"step": 20, "eval_loss": 3.5, "eval_code_loss": 3.0, "eval_text_loss": 4.0, "eval_perplexity": 33.1},
    {"step": 30, "loss": None},
    {"step": 40, "eval_loss": 2.5, "eval_code_loss": 2.0, "eval_text_loss": 3.0},
    {"step": 40, "train_runtime": 12.0},
]
LOADS = {"code": {"layers.0.attn": [0.7, 0.2, 0.1], "layers.1.attn": [0.2, 0.4, 0.4]}}
LOADS["text_$x$"] = {layer: load[::-1] for layer, load in LOADS["code"].items()}


def is_picture(path) -> bool:
    pixels = imread(path)
    return min(pixels.shape[:2]) > 200 and pixels[..., :3].std() > 0.02


def test_loss_curves_show_each_series(tmp_path, figures):
    plot_loss_curves(METRICS, tmp_path / "loss.png")
    assert is_picture(tmp_path / "loss.png")
    (axes,) = figures[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert list(lines) == ["training, all tasks", "validation, code", "validation, text", "validation, all tasks"]
    assert lines["training, all tasks"][:2] == [[10, 4.0], [20, 3.0]]
    assert lines["training, all tasks"][2][1] != lines["training, all tasks"][2][1], "a gap for what was not finite"
    assert lines["validation, code"] == [[20, 3.0], [40, 2.0]]
    assert lines["validation, all tasks"] == [[20, 3.5], [40, 2.5]]
    assert axes.get_title()
    assert "step" in axes.get_xlabel()
    assert "loss" in axes.get_ylabel()
    (legend,) = figures[0].legends
    assert len(legend.get_texts()) == 4
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_loss_curves_without_validation(tmp_path, figures):
    plot_loss_curves(METRICS[:2], tmp_path / "loss.png")
    assert len(figures[0].axes[0].lines) == 1
    with pytest.raises(InputError, match="no event has a loss"):
        plot_loss_curves([{"step": 1, "train_runtime": 2.0}], tmp_path / "none.png")


@pytest.mark.parametrize("first", [3.5, 40.0])
def test_no_first_loss_flattens_the_others(tmp_path, figures, first):
    """What the later losses take of the axis, in its own scale."""
    metrics = [{"step": 0, "eval_loss": first}, *METRICS, {"step": 60, "eval_loss": 0.5 if first == 40.0 else 2.0}]
    plot_loss_curves(metrics, tmp_path / "loss.png")
    (axes,) = figures[0].axes
    later = [event[key] for event in metrics[1:] for key in ("loss", "eval_loss") if event.get(key) is not None]
    heights = axes.transData.transform([(0, loss) for loss in later])[:, 1]
    assert (heights.max() - heights.min()) / axes.get_window_extent().height > 0.4
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) > 3 and not any("^" in label for label in labels), "numbers, not powers of ten"


def test_expert_load_has_a_panel_per_layer(tmp_path, figures):
    plot_expert_load(LOADS, tmp_path / "load.png")
    assert is_picture(tmp_path / "load.png")
    *panels, _colorbar = figures[0].axes
    assert [axes.get_title() for axes in panels] == ["layer 0", "layer 1"]
    for axes, layer in zip(panels, LOADS["code"], strict=True):
        shown = torch.tensor(axes.images[0].get_array().tolist())
        torch.testing.assert_close(shown, torch.tensor([LOADS[task][layer] for task in LOADS]))
        scale = axes.images[0].norm
        assert scale(1 / 3) == 0.5, "the even share is white"
        assert scale(0.7) == pytest.approx(1.0), "one scale for all layers"
    assert [label.get_text() for label in panels[0].get_yticklabels()] == list(LOADS)
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["0", "1", "2"], "counted as layers are"
    assert [text.get_text() for text in panels[0].texts] == ["0.70", "0.20", "0.10", "0.10", "0.20", "0.70"]


def test_nearly_even_loads_stay_pale(tmp_path, figures):
    plot_expert_load({"code": {"layers.0": [0.5001, 0.4999]}}, tmp_path / "load.png")
    assert figures[0].axes[0].images[0].norm(0.5001) == pytest.approx(0.5, abs=0.01)


def test_expert_load_of_many_layers(tmp_path, figures):
    loads = {"code": {f"model.layers.{layer}.self_attn": [0.5, 0.5] for layer in range(9)}}
    plot_expert_load(loads, tmp_path / "load.png")
    assert is_picture(tmp_path / "load.png")
    *panels, _colorbar = figures[0].axes
    assert len(panels) == 9
    labelled = [axes.get_title() for axes in panels if axes.xaxis.get_tick_params()["labelbottom"]]
    assert labelled == ["layer 5", "layer 6", "layer 7", "layer 8"], "the lowest of each column"
    for empty in ({}, {"code": {}}):
        with pytest.raises(InputError, match="at least one of both is wanted"):
            plot_expert_load(empty, tmp_path / "none.png")


def test_modulation_shows_tokens_by_features(tmp_path, figures):
    values = {f"model.layers.{layer}.self_attn": torch.randn(4, 30, dtype=torch.bfloat16) for layer in range(2)}
    values["model.layers.1.self_attn"][0, 0] = 1000.0
    plot_modulation(values, ["<|bos|>", " has", "$x$\n", "internationalisation"], tmp_path / "modulation.png")
    assert is_picture(tmp_path / "modulation.png")
    *panels, _colorbar = figures[0].axes
    for axes, tensor in zip(panels, values.values(), strict=True):
        torch.testing.assert_close(torch.tensor(axes.images[0].get_array().tolist()), tensor.float())
        low, high = axes.images[0].get_clim()
        assert low < -1 and 1 < high < 10, "a single outlier doesn't set the scale"
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    bar = figures[0].axes[-1]
    assert figures[0].bbox.y0 <= bar.yaxis.label.get_window_extent().y0, "the scale's label is whole"
    assert labels == ["<|bos|>", "␣has", "$x$\\n", "internationali…"[:13] + "…"]
    assert not any(label.get_parse_math() for label in panels[0].get_yticklabels())


def test_modulation_of_a_fresh_adapter_and_of_a_long_prompt(tmp_path, figures):
    plot_modulation({"layers.0": torch.zeros(500, 8)}, ["t"] * 500, tmp_path / "modulation.png")
    assert is_picture(tmp_path / "modulation.png")
    assert len(figures[0].axes[0].get_yticklabels()) <= 80
    assert figures[0].get_figheight() < 20


def test_wrong_modulation_is_named(tmp_path):
    with pytest.raises(InputError, match="no layer given"):
        plot_modulation({}, [], tmp_path / "none.png")
    with pytest.raises(InputError, match=r"layers.0: shape \[2, 8\] given, \[3, features\] is wanted"):
        plot_modulation({"layers.0": torch.zeros(2, 8)}, ["a", "b", "c"], tmp_path / "none.png")


def test_a_run_s_plots_need_no_pyplot(tmp_path):
    before = set(sys.modules)
    parts = {"metrics": METRICS, "modulation": {"layers.0": torch.zeros(1, 8)}, "tokens": ["a"]}
    files = write_plots(tmp_path / "plots", loads=LOADS, **parts)
    assert sorted(file.name for file in files) == ["expert_load.png", "loss.png", "modulation.png"]
    assert all(is_picture(file) for file in files)
    assert len(write_plots(tmp_path / "shared_only", loads=None, **parts)) == 2
    assert "matplotlib.pyplot" not in set(sys.modules) - before
