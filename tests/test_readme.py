"""What the first page shows works: its recipe is read, its Python compiles, its commands, files and links are there."""

import re

from hycam.training.recipe import load_recipe
from hycam_cli import _parser, split_overrides
from tests.distributed.ranks import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_recipe_is_that_of_the_examples(tmp_path):
    """Which tests/examples runs."""
    (recipe,) = blocks("yaml")
    (tmp_path / "own_data.yaml").write_text(recipe)
    assert load_recipe(str(tmp_path / "own_data.yaml")) == load_recipe(str(REPOSITORY / "examples/own_data.yaml"))


def test_the_python_compiles():
    assert blocks("python")
    for code in blocks("python"):
        compile(code, "README.md", "exec")


def test_the_commands_exist():
    commands = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    hycam = [command for command in commands if command.startswith("hycam ")]
    assert len(hycam) > 5
    for command in hycam:
        own, _ = split_overrides(re.findall(r'"[^"]*"|\S+', command)[1:])
        _parser().parse_args(own)
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = [command.removeprefix("make ") for command in commands if command.startswith("make ")]
    assert targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_links_and_pictures_are_there():
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert link.startswith("https://") or (REPOSITORY / link).exists(), link
