"""The run that the commands' tests share."""

from pathlib import Path

import pytest

from hycam_cli import main
from tests.training.runs import recipe_values, save_backbone, save_recipe


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that `hycam train` made; its parent has the recipe, the rows and the backbone."""
    folder = tmp_path_factory.mktemp("cli")
    values = recipe_values(folder, save_backbone(folder / "backbone"))
    recipe = save_recipe(folder, values)
    assert main(["train", str(recipe), "--trainer.max_steps", "4"]) == 0
    return folder / "run"
