"""What a grid of learning rates gives, by results written by hand; and what is told of a run on its way."""

import json
from pathlib import Path
from typing import Any

import pytest

from hycam.errors import InputError
from hycam.study.progress import UnitProgress
from hycam.study.recipe import Study, parse_study
from hycam.study.record import chosen_rate
from hycam.study.run import _Runner
from hycam.study.units import DIVERGED, Unit, run_folder, tuning, units
from tests.study.studies import study_values

RATES = [1e-4, 3e-4, 1e-3]


def study(folder: Path, **sections: Any) -> Study:
    values = study_values(folder, folder, methods={"hycam": {"r": 2, "num_experts": 2}}, learning_rates=RATES)
    return parse_study(values | sections, "study.yaml")


def answer(of: Study, loss_of: dict[float, float | None]) -> None:
    """Results of the grid's runs as far as the losses are given; None: training broke down."""
    for unit in tuning(of):
        assert unit.tried_rate is not None
        if unit.tried_rate in loss_of:
            loss = loss_of[unit.tried_rate]
            overall = {"overall": {"nll": 10 * (loss or 0.0), "tokens": 10}}
            folder = run_folder(of, unit)
            folder.mkdir(parents=True, exist_ok=True)
            rest = dict.fromkeys(("recipe", "parameters", "versions", "devices", "steps", "best_step"))
            results = rest | {"untested": overall} if loss is not None else {DIVERGED: "not finite"}
            (folder / "results.json").write_text(json.dumps(results))


def rates(of: Study) -> list[float | None]:
    return [unit.tried_rate for unit in tuning(of)]


def edges_told(of: Study) -> list[str]:
    lines: list[str] = []
    runner = _Runner(of, print, lines.append)
    for _ in range(2):
        runner._warn_of_edges()
    return lines


@pytest.mark.parametrize(
    ("losses", "edge"), [((1.0, 2.0, 3.0), "lowest"), ((3.0, 2.0, 1.0), "highest"), ((2.0, 1.0, 2.0), None)]
)
def test_a_best_rate_at_the_edge_is_told_once(tmp_path: Path, losses: tuple[float, ...], edge: str | None) -> None:
    of = study(tmp_path)
    assert edges_told(of) == []
    answer(of, dict(zip(RATES, losses, strict=True)))
    told = edges_told(of)
    assert len(told) == (edge is not None)
    for line in told:
        assert line.startswith(f"tiny, hycam: the best rate, {chosen_rate(of, 'tiny', 'hycam'):g}, is the {edge} of ")
    assert rates(of) == RATES, "widening is for those who ask for it"


def test_a_grid_is_widened_until_its_best_rate_lies_inside(tmp_path: Path) -> None:
    of = study(tmp_path, widen_rates=3)
    assert rates(of) == RATES
    assert chosen_rate(of, "tiny", "hycam") is None
    answer(of, {1e-4: 3.0, 3e-4: 2.0, 1e-3: 1.0})
    beyond = 3.333e-3
    assert rates(of) == [*RATES, beyond]
    assert chosen_rate(of, "tiny", "hycam") is None, "the new rate isn't tried yet"
    assert Unit("tiny", "hycam", 0, 0, beyond) in units(of)
    answer(of, {beyond: 0.5})
    assert len(rates(of)) == 5
    answer(of, {rates(of)[-1]: None})  # where training breaks down
    assert len(rates(of)) == 5
    assert chosen_rate(of, "tiny", "hycam") == beyond
    assert edges_told(of) == []


def test_widening_ends_after_as_many_rates_as_were_allowed(tmp_path: Path) -> None:
    of = study(tmp_path, widen_rates=1)
    answer(of, {1e-4: 1.0, 3e-4: 2.0, 1e-3: 3.0})
    below = rates(of)[-1]
    assert below == pytest.approx(1e-4 / 3, rel=1e-3)
    assert below is not None
    answer(of, {below: 0.5})
    assert rates(of) == [*RATES, below]
    assert "lowest of its grid" in edges_told(of)[0]


def test_a_negative_number_of_rates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"widen_rates: got -1, wanted 0 or more"):
        study(tmp_path, widen_rates=-1)


def test_the_running_cell_says_how_far_it_is(tmp_path: Path) -> None:
    of = study(tmp_path)
    unit = tuning(of)[0]
    progress = UnitProgress(of, unit)
    assert progress.read() == (None, "before its first log")
    log = run_folder(of, unit) / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"step": 1, "epoch": 0.25, "loss": 2.5}\n{"step": 1, "eval_loss": 3.0}\n')
    assert progress.read() == (0.25, "step 1/4, loss 2.5")
    assert progress.seconds_for(0.75, 0.25, 60.0) == 180.0
    lines: list[str] = []
    runner = _Runner(of, print, lines.append)
    runner._report(unit, UnitProgress(of, unit), 60.0)  # goes on from a checkpoint, and has not logged since
    assert lines == ["[0/5] tuning/tiny/hycam/lr-0.0001: step 1/4, loss 2.5"]
    lines.clear()
    text = log.read_text()
    log.write_text(text + '{"step": 4, "epoch": 1.0, "loss": 2.0}\n')
    runner._report(unit, progress, 60.0)
    assert lines == ["[0/5] tuning/tiny/hycam/lr-0.0001: step 4/4, measuring, the study about 4 min"]
    log.write_text(text)
    lines.clear()
    runner._report(unit, progress, 60.0)
    assert lines == [
        "[0/5] tuning/tiny/hycam/lr-0.0001: step 1/4, loss 2.5, about 3 min of training left, the study about 19 min"
    ]
