"""A study's figures: what they show, from a JSON file alone, the same each time."""

import json
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from hycam.analysis.figures import draw_figure
from hycam.analysis.plots import modulation_scale
from hycam.errors import InputError

CURVES = {
    "hycam": {
        "training": {"step": [1, 2, 3], "mean": [3.0, 2.0, 1.5], "std": [0.5, 0.25, 0.1]},
        "validation": {"step": [2], "mean": [2.5], "std": [0.2]},
    },
    "lora_$r$": {
        "training": {"step": [1, 2], "mean": [3.5, 3.0], "std": [None, None]},
        "validation": {"step": [], "mean": [], "std": []},
    },
}
POINTS = [
    {"value": 5, "mean": 3.0, "std": 0.1},
    {"value": 1, "mean": 3.5, "std": None},
    {"value": 2, "mean": 3.2, "std": 0.2},
]
STATES = {"points": {"code": [[0.0, 1.0], [2.0, 3.0]], "text": [[4.0, 5.0]]}, "perplexity": 1.0, "silhouette": 0.25}
LAYERS = {f"model.layers.{layer}.self_attn": [[0.1 * layer + 0.2, -1.0, 0.5], [0.0, 0.3, 9.0]] for layer in range(2)}
DATA = {
    "loss_curves": {"curves": CURVES},
    "sweep": {"label": "number of experts", "points": POINTS},
    "expert_load": {"loads": {"code": {"layers.0": [0.7, 0.3]}, "text": {"layers.0": [0.4, 0.6]}}},
    "value_states": {
        "title": "layer 2 of 2",
        "embeddings": {"backbone": STATES, "with hycam": STATES | {"silhouette": None}},
    },
    "modulation": {
        "title": "$A_\\mathrm{fusion}$",
        "features": [0, 15, 31],
        "tasks": {
            "code": {"tokens": ["def", " $x$"], "layers": LAYERS},
            "text": {"tokens": ["\n", "it"], "layers": LAYERS},
        },
    },
}
FIGURES = pytest.mark.parametrize("figure", DATA)


@pytest.fixture
def draw(tmp_path, figures):
    """Writes a figure's JSON, draws it, and returns the figure that was drawn."""

    def make(kind, **changes):
        path = tmp_path / f"{kind}-llama-3.1.json"
        path.write_text(json.dumps({"figure": kind} | DATA[kind] | changes))
        draw_figure(path)
        return figures[0]

    return make


@FIGURES
def test_png_and_svg_are_pictures_and_the_same_each_time(figure, tmp_path):
    path = tmp_path / f"{figure}-llama-3.1.json"
    path.write_text(json.dumps({"figure": figure} | DATA[figure]))
    modules = set(sys.modules)
    files = draw_figure(path)
    assert [file.name for file in files] == [f"{figure}-llama-3.1.png", f"{figure}-llama-3.1.svg"]
    pixels = imread(files[0])
    assert min(pixels.shape[:2]) > 200 and pixels[..., :3].std() > 0.02
    assert "<svg" in files[1].read_text()
    before = [file.read_bytes() for file in files]
    assert [file.read_bytes() for file in draw_figure(path)] == before
    assert "matplotlib.pyplot" not in set(sys.modules) - modules


def test_loss_curves_have_a_mean_for_each_method_and_a_legend_beside_them(draw):
    figure = draw("loss_curves")
    training, validation, *_ = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in training.lines}
    assert lines == {"hycam": [[1, 3.0], [2, 2.0], [3, 1.5]], "lora_$r$": [[1, 3.5], [2, 3.0]]}
    assert [line.get_xydata().tolist() for line in validation.lines] == [[[2, 2.5]], []]
    assert validation.lines[0].get_marker() == "o", "of one point no line is drawn"
    assert all(line.get_marker() == "" for line in training.lines)
    (legend,) = figure.subfigs[0].legends
    assert [text.get_text() for text in legend.get_texts()] == list(CURVES)
    assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in (training, validation))


def test_each_method_s_band_has_a_panel_of_its_own(draw):
    curves = CURVES | {"full": CURVES["hycam"]}
    _, _, hycam, full = draw("loss_curves", curves=curves).axes
    assert [axes.get_title() for axes in (hycam, full)] == ["hycam", "full"], "one run has no spread"
    for axes in (hycam, full):
        training, _validation = axes.collections
        band = {tuple(point) for point in training.get_paths()[0].vertices.tolist()}
        assert band >= {(1, 2.5), (1, 3.5), (2, 1.75), (2, 2.25), (3, 1.4), (3, 1.6)}
        assert [line.get_xydata().tolist() for line in axes.lines[-2:]] == [[[1, 3.0], [2, 2.0], [3, 1.5]], [[2, 2.5]]]
        assert axes.lines[-1].get_linestyle() != axes.lines[-2].get_linestyle()
        assert len(axes.lines) == len(curves) + 2, "the others' means are there to compare with"


def test_single_runs_have_means_alone(draw):
    curves = {"lora": CURVES["lora_$r$"]}
    assert len(draw("loss_curves", curves=curves).axes) == 2


def test_a_loss_that_was_not_finite_leaves_a_gap(draw):
    kinds = {"step": [1, 2, 3], "mean": [3.0, None, 1.0], "std": [0.1, None, 0.1]}
    for axes in draw("loss_curves", curves={"lora": {"training": kinds, "validation": kinds}}).axes:
        assert all(np.isnan(line.get_ydata()).tolist() == [False, True, False] for line in axes.lines)


def test_methods_beyond_the_colours_differ_by_their_lines(draw):
    curves = {f"method {n}": CURVES["hycam"] for n in range(23)}
    lines = draw("loss_curves", curves=curves).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 23


def test_a_sweep_is_in_order_with_its_spread(draw):
    (axes,) = draw("sweep").axes
    line, _, (bars,) = axes.containers[0]
    assert line.get_xydata().tolist() == [[1, 3.5], [2, 3.2], [5, 3.0]]
    ends = [segment[:, 1] for segment in bars.get_segments() if len(segment)]
    assert np.allclose(ends[-2:], [[3.0, 3.4], [2.9, 3.1]])
    assert all(np.isnan(segment).all() for segment in ends[:-2]), "one run has no spread"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "5"]
    assert axes.get_xlabel() == "number of experts"


def test_value_states_have_a_panel_for_each_model_and_a_colour_for_each_task(draw):
    figure = draw("value_states")
    assert [axes.get_title() for axes in figure.axes] == ["backbone (silhouette of the tasks: 0.250)", "with hycam"]
    for axes in figure.axes:
        code, text = axes.collections
        assert code.get_offsets().tolist() == STATES["points"]["code"]
        assert text.get_offsets().tolist() == STATES["points"]["text"]
        assert code.get_facecolor().tolist() != text.get_facecolor().tolist()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["code", "text"]
    assert figure.get_suptitle() == "layer 2 of 2"


def test_modulation_has_a_row_for_each_task_and_a_column_for_each_layer(draw):
    *panels, _colorbar = draw("modulation").axes
    titles = [axes.get_title() for axes in panels]
    assert titles == ["code, layer 0", "code, layer 1", "text, layer 0", "text, layer 1"]
    for axes, values in zip(panels, [*LAYERS.values()] * 2, strict=True):
        assert axes.images[0].get_array().tolist() == values
        assert axes.images[0].norm is panels[0].images[0].norm, "one scale for all"
    labels = [[label.get_text() for label in axes.get_yticklabels()] for axes in (panels[0], panels[2])]
    assert labels == [["def", "␣$x$"], ["\\n", "it"]]
    assert [label.get_text() for label in panels[-2].get_xticklabels()] == ["0", "15", "31"]


def test_the_modulation_uses_all_colours_and_no_outlier_sets_its_scale(draw):
    """SiLU hardly goes below 0, and far above."""
    values = np.linspace(-0.2, 3, 600).reshape(20, 30)
    values[0, 0] = 1000
    task = {"tokens": ["t"] * 20, "layers": {"layers.0": values.tolist()}}
    panel, bar = draw("modulation", tasks={"code": task}, features=list(range(30))).axes
    low, high = panel.images[0].get_clim()
    assert -0.2 < low < -0.15 and 2.9 < high < 3
    assert [panel.images[0].norm(value) for value in (low, 0, high)] == [0, 0.5, 1]
    assert "1st and the 99th percentile" in bar.get_ylabel()
    ticks = bar.get_yticks().tolist()
    assert (min(ticks), max(ticks)) == (low, high), "the ends are named"


@pytest.mark.parametrize(("values", "ends"), [([0.0, 0.0], (-1, 1)), ([2.0, 2.0], (-2, 2)), ([-3.0, -3.0], (-3, 3))])
def test_a_modulation_of_one_sign_has_a_scale(values, ends):
    scale = modulation_scale([np.array(values)])
    assert (scale.vmin, scale.vmax) == ends


@pytest.mark.parametrize(
    ("figure", "changes", "message"),
    [
        ("loss_curves", {"curves": {}}, "curves: no method has a loss"),
        ("loss_curves", {"curves": {"lora": {"training": CURVES["lora_$r$"]["validation"]}}}, "no method has a loss"),
        ("sweep", {"points": []}, "points: none given"),
        ("value_states", {"embeddings": {}}, "embeddings: none given"),
        ("modulation", {"tasks": {}}, "tasks: 0 given and no layer"),
        ("modulation", {"tasks": {"a": {"tokens": [], "layers": {}}}}, "tasks: 1 given and no layer"),
        (
            "sweep",
            {"figure": "pie"},
            r"sweep-llama-3\.1\.json: no figure's data: .*wanted `figure`: loss_curves, sweep",
        ),
    ],
)
def test_nothing_to_draw_is_named(draw, figure, changes, message):
    with pytest.raises(InputError, match=message):
        draw(figure, **changes)


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_file_that_is_no_figure(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=r"x\.json: no figure's data"):
        draw_figure(tmp_path / "x.json")
