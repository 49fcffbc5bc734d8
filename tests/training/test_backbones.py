"""The backbones that ship: a recipe names them, and the paper's adapters fit the architectures that they have."""

from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

from hycam.errors import InputError
from hycam.study.recipe import load_study, parse_study
from hycam.training.backbone import build_model
from hycam.training.prepare import adapted
from hycam.training.recipe import Recipe, load_recipe, packaged_backbones, parse_recipe

# hub id, class; d, layers, heads, key-value heads, MLP width, vocabulary, tied embeddings: as in the hub's config.json
ARCHITECTURES: dict[str, tuple[str, type[PretrainedConfig], tuple[int, ...]]] = {
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", LlamaConfig, (4096, 32, 32, 32, 11008, 32000, 0)),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", LlamaConfig, (4096, 32, 32, 8, 14336, 128256, 0)),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", LlamaConfig, (4096, 32, 32, 8, 14336, 128256, 0)),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", LlamaConfig, (2048, 16, 32, 8, 8192, 128256, 1)),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", LlamaConfig, (3072, 28, 24, 8, 8192, 128256, 1)),
    "mistral-7b-v0.3": ("mistralai/Mistral-7B-v0.3", MistralConfig, (4096, 32, 32, 8, 14336, 32768, 0)),
    "qwen-2.5-0.5b": ("Qwen/Qwen2.5-0.5B", Qwen2Config, (896, 24, 14, 2, 4864, 151936, 1)),
    "qwen-2.5-1.5b": ("Qwen/Qwen2.5-1.5B", Qwen2Config, (1536, 28, 12, 2, 8960, 151936, 1)),
    "qwen-2.5-3b": ("Qwen/Qwen2.5-3B", Qwen2Config, (2048, 36, 16, 2, 11008, 151936, 1)),
    "qwen-2.5-7b": ("Qwen/Qwen2.5-7B", Qwen2Config, (3584, 28, 28, 4, 18944, 152064, 0)),
    "qwen-2.5-14b": ("Qwen/Qwen2.5-14B", Qwen2Config, (5120, 48, 40, 8, 13824, 152064, 0)),
}
NAMES = pytest.mark.parametrize("name", ARCHITECTURES)


def model_config(name: str, layers: int | None = None) -> PretrainedConfig:
    _, config, (hidden, all_layers, heads, kv_heads, intermediate, vocabulary, tied) = ARCHITECTURES[name]
    return config(
        hidden_size=hidden,
        num_hidden_layers=layers or all_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        tie_word_embeddings=bool(tied),
    )


def test_they_are_the_papers() -> None:
    assert {name: section["name_or_path"] for name, section in packaged_backbones().items()} == {
        name: hub_id for name, (hub_id, *_) in ARCHITECTURES.items()
    }


@NAMES
@pytest.mark.parametrize("recipe", ["paper", "released_code"])
def test_a_recipe_takes_each_by_name(recipe: str, name: str) -> None:
    loaded = load_recipe(recipe, [("backbone", name)])
    assert loaded.backbone.name_or_path == ARCHITECTURES[name][0]
    assert (loaded.backbone.dtype, loaded.backbone.attn_implementation) == ("bfloat16", "sdpa")
    assert (loaded.backbone.pad_token is None) == name.startswith("qwen")
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(loaded.to_dict())), "again") == loaded


@NAMES
@pytest.mark.parametrize("recipe", ["paper", "released_code"])
@pytest.mark.parametrize("layers", [2, pytest.param(None, marks=pytest.mark.slow)])
def test_the_adapter_fits(layers: int | None, recipe: str, name: str) -> None:
    """On the meta device; the count by hand: shared d^2, experts 2rd + r^2, router, and in the released code norms and
    biases beside, its router frozen."""
    loaded, config = load_recipe(recipe, [("backbone", name)]), model_config(name, layers)
    model = adapted(build_model(loaded.backbone, config), loaded.method)
    assert model.get_nb_trainable_parameters()[0] == config.num_hidden_layers * trained(recipe, config.hidden_size)


def trained(recipe: str, d: int, experts: int = 5, r: int = 64) -> int:
    """Parameters of a layer."""
    count = d * d + experts * (2 * r * d + r * r)
    return count + experts * d if recipe == "paper" else count + d + experts * (2 * r + d) + 2 * d


def test_the_share_that_the_paper_trains_of_llama_2_7b() -> None:
    """The counts that follow from the paper's equations: 622 M, 537 M of them shared."""
    config = model_config("llama-2-7b")
    assert round(config.num_hidden_layers * trained("paper", config.hidden_size) / 1e6) == 622
    assert round(config.num_hidden_layers * config.hidden_size**2 / 1e6) == 537


def test_a_recipe_s_own_file_names_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("backbone: qwen-2.5-0.5b\n")
    assert load_recipe(str(path)).backbone.name_or_path == "Qwen/Qwen2.5-0.5B"
    section = load_recipe(str(path), [("backbone.dtype", "float32")]).backbone
    assert (section.name_or_path, section.dtype) == ("Qwen/Qwen2.5-0.5B", "float32")


def test_fields_after_the_name_change_it_and_before_it_are_lost() -> None:
    def dtype(*overrides: tuple[str, str]) -> str:
        return load_recipe("paper", overrides).backbone.dtype

    assert dtype(("backbone", "llama-3-8b"), ("backbone.dtype", "float16")) == "float16"
    assert dtype(("backbone.dtype", "float16"), ("backbone", "llama-3-8b")) == "bfloat16"


def test_an_unknown_name_is_reported_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"--backbone: got 'llama-3\.1-8', wanted .*; did you mean 'llama-3\.1-8b'\?"):
        load_recipe("paper", [("backbone", "llama-3.1-8")])
    with pytest.raises(InputError, match=r"my\.yaml: backbone: got 'gpt', wanted fields, or a name that ships"):
        parse_recipe({"backbone": "gpt"}, "my.yaml")


def test_a_study_names_them_too() -> None:
    values = {"backbones": {"small": "qwen-2.5-0.5b"}, "methods": {"hycam": {}}, "tasks": [{"name": "dolly"}]}
    study = parse_study(values, "my.yaml")
    recipe = study.recipe("small", "hycam", fold=0, seed=0, learning_rate=1e-4, folder="x")
    assert recipe.backbone == load_recipe("paper", [("backbone", "qwen-2.5-0.5b")]).backbone
    assert load_study("study_7b").backbones["llama-2-7b"]["name_or_path"] == "meta-llama/Llama-2-7b-hf"
    with pytest.raises(InputError, match=r"my\.yaml: backbones\.small: got 'qwen-2\.5', wanted fields, or a name that"):
        parse_study(values | {"backbones": {"small": "qwen-2.5"}}, "my.yaml")


def test_a_list_of_them_is_no_backbone() -> None:
    with pytest.raises(InputError, match="backbone"):
        parse_recipe({"backbone": ["llama-2-7b"]}, "my.yaml")


def test_parsing_twice_shares_nothing() -> None:
    first: Recipe = load_recipe("paper", [("backbone", "llama-3-8b"), ("backbone.pad_token", "x")])
    assert first.backbone.pad_token == "x"
    assert load_recipe("paper", [("backbone", "llama-3-8b")]).backbone.pad_token == "<|reserved_special_token_0|>"
