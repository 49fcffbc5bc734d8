"""The demo's recipe: as it ships, and a much smaller run of it from end to end."""

import pytest
from matplotlib.image import imread
from transformers import AutoTokenizer

from hycam.data.synthetic import SYNTHETIC_TASKS, general_text
from hycam.training.recipe import load_recipe
from hycam.training.run import train
from hycam.training.scratch import train_tokenizer
from hycam.training.tasks import load_rows, tokenize_split

SMALL = {
    # As small as it may be and still attend: an attention that writes nothing leaves nothing to modulate.
    "backbone.scratch": "{hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 2, "
    "max_position_embeddings: 256, num_documents: 2000, steps: 150, batch_size: 8, sequence_length: 64, "
    "learning_rate: 1e-2}",
    "method.r": "4",
    "trainer.max_steps": "120",
    "trainer.eval_steps": "60",
    "trainer.save_steps": "60",
    "trainer.logging_steps": "10",
    "trainer.learning_rate": "2e-2",
    "trainer.report_to": "[]",
}


def small_demo(folder) -> dict:
    rows = {f"tasks.{index}.max_rows": "80" for index in range(5)}
    recipe = load_recipe("demo", list((SMALL | rows | {"output_dir": str(folder)}).items()))
    return train(recipe)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, small_demo(folder)


def test_ships_the_five_families_and_nothing_from_outside():
    recipe = load_recipe("demo")
    assert [task.source for task in recipe.tasks] == list(SYNTHETIC_TASKS)
    assert recipe.backbone.scratch is not None
    assert recipe.backbone.scratch.corpus == "synthetic"
    rows = load_rows(recipe.tasks, recipe.data)
    tokenizer = train_tokenizer(general_text(2000, recipe.seed), recipe.backbone.scratch)
    longest = max(
        len(ids)
        for split in ("train", "validation", "test")
        for dataset in tokenize_split(rows, split, tokenizer, recipe.data).values()
        for ids in dataset["input_ids"]
    )
    assert longest < recipe.data.max_length, "no row of the demo is cut"


def test_every_task_is_learnt_on_held_out_rows(demo):
    _, results = demo
    base, adapted = results["test"]["base"]["tasks"], results["test"]["adapted"]["tasks"]
    assert len(base) == 5
    for task, before in base.items():
        assert adapted[task]["perplexity"] < 0.8 * before["perplexity"], task
        assert adapted[task]["tokens"] == before["tokens"] > 50
    overall = {name: report["overall"]["perplexity"] for name, report in results["test"].items()}
    assert overall["adapted"] < 0.5 * overall["base"]
    for layers in results["expert_load"].values():
        assert len(layers) == 2
        assert all(sum(load) == pytest.approx(1, rel=1e-5) for load in layers.values())


def test_leaves_plots_and_a_backbone_that_loads(demo):
    folder, results = demo
    plots = {file.name: imread(file) for file in (folder / "plots").iterdir()}
    assert set(plots) == {"expert_load.png", "loss.png", "modulation.png"}
    assert all(pixels[..., :3].std() > 0.02 for pixels in plots.values())
    assert AutoTokenizer.from_pretrained(results["backbone"]).eos_token == "<|eos|>"


def test_the_seed_repeats_the_numbers(demo, tmp_path):
    _, results = demo
    again = small_demo(tmp_path)
    assert again["test"] == results["test"]
    assert again["expert_load"] == results["expert_load"]
