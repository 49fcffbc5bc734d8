"""A tiny study that has run, but for some of its cells."""

import shutil
from pathlib import Path

import pytest

from hycam.study.recipe import Study, load_study
from hycam.study.record import write_record
from hycam.training.run import train
from tests.reporting.studies import CELLS, TEXTS
from tests.study.studies import save_study, study_values
from tests.training.runs import save_backbone, save_rows


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("report")
    values = study_values(folder, save_backbone(folder / "backbone"), keep="models")
    values["methods"] = {
        "full": {"name": "full"},
        "lora": {"name": "lora", "r": 2},
        "hycam": {"r": 2, "num_experts": 2},
        "three": {"r": 2, "num_experts": 3},
    }
    study = load_study(str(save_study(folder, values)))
    for method, seed in CELLS:
        cell = f"cells/tiny/{method}/fold0-seed{seed}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hycam.training.run._draw", lambda *arguments: None)  # seconds for each run
            train(study.recipe("tiny", method, fold=0, seed=seed, learning_rate=1e-2, folder=cell))
        for checkpoint in (study.output_path / cell).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    write_record(study)
    save_rows(study.output_path / "text.jsonl", [{"text": text} for text in TEXTS])
    return study


@pytest.fixture
def study(finished: Study, tmp_path: Path) -> Path:
    """A copy of the study's folder of a test's own."""
    shutil.copytree(finished.output_path, tmp_path / "study")
    return tmp_path / "study"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures' data without their pictures, which take seconds."""
    monkeypatch.setattr("hycam.reporting.report.draw_figure", lambda path: [])
