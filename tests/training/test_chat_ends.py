"""A base model under a chat template: what closes an answer in training ends it wherever the run's model generates."""

from argparse import Namespace
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from hycam.commands.selection import select
from hycam.training.recipe import load_recipe
from hycam.training.run import train
from hycam.training.trained import load_selected_model, load_selected_tokenizer
from tests.training.runs import recipe_values, save_backbone, save_recipe


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its eos token is `<eos>`; the template closes a turn with another, and a line."""
    folder = save_backbone(tmp_path_factory.mktemp("base"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["~"])
    assert len(tokenizer) == 320
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", "'~\n'")
    tokenizer.save_pretrained(folder)
    # as some published settings are: transformers bears with it, but refuses to save it once anything is changed
    flawed = GenerationConfig.from_pretrained(folder)
    flawed.update(do_sample=False, temperature=0.7)
    flawed.to_json_file(str(folder / "generation_config.json"))
    return folder


@pytest.mark.parametrize(("method", "saved"), [("lora", "adapter"), ("full", "model")])
def test_what_was_trained_ends_answers_where_its_rows_do(
    tmp_path: Path, base_model: Path, method: str, saved: str
) -> None:
    values = recipe_values(tmp_path, base_model, trainer={"max_steps": 2, "eval_steps": 2, "save_steps": 2})
    recipe = load_recipe(str(save_recipe(tmp_path, values | {"method": {"name": method}})))
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("~")]
    train(recipe)
    assert GenerationConfig.from_pretrained(recipe.output_path / saved).eos_token_id == ends
    selection = select(Namespace(recipe=str(recipe.output_path), adapter=None, base=False, overrides=[]))
    model = load_selected_model(selection, *load_selected_tokenizer(selection))
    assert model.generation_config.eos_token_id == ends
