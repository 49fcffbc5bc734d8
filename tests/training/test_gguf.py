"""A backbone in a GGUF file trains, reloads, answers and is planned as one of safetensors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from gguf import GGMLQuantizationType
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hycam.data.tokenization import encode_row_prompt
from hycam.errors import InputError
from hycam.training import known_backbones
from hycam.training.backbone import check_available, load_backbone_config, load_model, load_tokenizer
from hycam.training.recipe import BackboneConfig, parse_recipe
from hycam.training.run import train
from hycam.training.trained import load_run
from hycam_cli import main
from hycam_kernels.versions import release
from tests.training.gguf_files import save_gguf
from tests.training.runs import recipe_values

pytestmark = pytest.mark.skipif(release(transformers.__version__) < (5, 18), reason="refused with this transformers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_gguf(tmp_path_factory.mktemp("backbone"))


def named(file: Path, way: str) -> dict[str, str]:
    return {"name_or_path": str(file)} if way == "file" else {"name_or_path": str(file.parent), "gguf_file": file.name}


@pytest.mark.parametrize("way", ["file", "folder"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_what_is_loaded_is_what_the_file_has(tmp_path: Path, way: str, dtype: str) -> None:
    file, original = save_gguf(tmp_path, GGMLQuantizationType.F32)
    config = BackboneConfig(**named(file, way), dtype=dtype)
    name = config.name_or_path
    check_available(config)
    model, tokenizer = load_model(config, name), load_tokenizer(config, name)
    wanted = AutoModelForCausalLM.from_pretrained(original, dtype=model.dtype)
    assert model.dtype == (torch.float32 if dtype == "auto" else torch.bfloat16)
    assert load_backbone_config(config, name).num_hidden_layers == wanted.config.num_hidden_layers
    assert model.name_or_path == str(file)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, wanted(ids).logits)
    reference = AutoTokenizer.from_pretrained(original)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (reference.eos_token, reference.pad_token)
    assert tokenizer.chat_template == reference.chat_template
    text = "Say the colour of cat 3<eos>"
    assert tokenizer(text)["input_ids"] == reference(text)["input_ids"]


@pytest.mark.parametrize(("method", "way"), [("hycam", "file"), ("full", "folder")])
def test_a_run_trains_reloads_and_is_measured_again(
    tmp_path: Path, saved: tuple[Path, Path], capsys: pytest.CaptureFixture[str], method: str, way: str
) -> None:
    file, _ = saved
    section = {"name": method} if method == "full" else {"r": 4, "num_experts": 2}
    values = recipe_values(tmp_path, file, data={"max_length": 128}) | {"backbone": named(file, way), "method": section}
    recipe = parse_recipe(values, "recipe")
    results = train(recipe)
    run = recipe.output_path
    assert results["test"]["adapted"]["overall"]["nll"] < results["test"]["base"]["overall"]["nll"]
    assert main(["eval", str(run), "--no-generation", "--output", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["overall"]["nll"] == pytest.approx(results["test"]["adapted"]["overall"]["nll"], rel=1e-6)
    assert main(["plan", str(run), "--json"]) == 0
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "Say", "--max-new-tokens", "3"]) == 0
    answer = capsys.readouterr().out.rstrip("\n")
    model, tokenizer = load_run(run)
    ids = torch.tensor([encode_row_prompt({"instruction": "Say", "input": ""}, recipe.data.prompt, tokenizer)])
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True) == answer
    if method == "full":
        saved_model = AutoModelForCausalLM.from_pretrained(run / "model")
        assert not getattr(saved_model.config, "quantization_config", None)
        assert AutoTokenizer.from_pretrained(run / "model").chat_template
        return
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(file)
    assert f'gguf_file="{file.name}"' in (run / "adapter" / "README.md").read_text()
    capsys.readouterr()
    outside = tmp_path / "elsewhere"
    (run / "adapter").rename(outside)  # with no recipe beside it, its settings name the backbone
    assert main(["generate", "--adapter", str(outside), "--prompt", "Say", "--max-new-tokens", "3"]) == 0
    backbone = load_model(BackboneConfig(name_or_path=str(file)), str(file))
    assert isinstance(PeftModel.from_pretrained(backbone, str(outside)), PeftModel)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name_or_path": "x.gguf"}, r"backbone\.name_or_path: x\.gguf: no such file"),
        (
            {"name_or_path": "{folder}", "gguf_file": "absent.gguf"},
            r"absent\.gguf: no such file; GGUF files there: tiny",
        ),
        ({"name_or_path": "{file}", "gguf_file": "tiny.gguf"}, r"gguf_file: got 'tiny\.gguf' beside the file"),
        (
            {"name_or_path": "{file}", "quantization": "bnb-4bit"},
            r"quantization: got 'bnb-4bit', wanted null for a GGUF file",
        ),
        (
            {"name_or_path": "{file}", "revision": "main"},
            r"revision: got 'main' for the file .*, which has no revisions",
        ),
        ({"gguf_file": "tiny.gguf", "scratch": {"steps": 2}}, r"gguf_file: got 'tiny\.gguf' with scratch"),
    ],
)
def test_what_is_wrong_is_named(saved: tuple[Path, Path], section: dict[str, str], message: str) -> None:
    file, _ = saved
    filled = {
        key: value.format(file=file, folder=file.parent) if isinstance(value, str) else value
        for key, value in section.items()
    }
    with pytest.raises(InputError, match=message):
        check_available(parse_recipe({"backbone": filled}, "recipe").backbone)


@pytest.mark.parametrize(
    ("method", "multiplies", "dtype"),
    [("hycam", True, "bfloat16"), ("hycam", False, "float32"), ("full", True, "float32")],
)
def test_the_dtype_is_the_machines(
    saved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, method: str, multiplies: bool, dtype: str
) -> None:
    monkeypatch.setattr(known_backbones, "multiplies_bfloat16", lambda: multiplies)
    values = {"backbone": {"name_or_path": str(saved[0])}, "method": {"name": method}}
    assert parse_recipe(values, "recipe").backbone.dtype == dtype
    values["backbone"]["dtype"] = "float16"
    assert parse_recipe(values, "recipe").backbone.dtype == "float16"


def test_a_file_of_a_hub_repository(tmp_path: Path, saved: tuple[Path, Path]) -> None:
    """The hub's cache on this machine answers for it."""
    repository, commit = tmp_path / "hub" / "models--owner--tiny", "0" * 40
    for folder in ("refs", f"snapshots/{commit}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copy2(saved[0], repository / "snapshots" / commit)
    values = recipe_values(tmp_path, saved[0], data={"max_length": 128})
    values["backbone"] = {"name_or_path": "owner/tiny", "gguf_file": saved[0].name, "dtype": "float32"}
    values["trainer"]["max_steps"] = 1
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    code = f"""
from hycam.training.trained import load_run
from hycam_cli import main
assert main(["train", {str(recipe)!r}]) == 0
model, tokenizer = load_run({values["output_dir"]!r})
print(model.peft_config["default"].base_model_name_or_path, tokenizer.eos_token)
"""
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1].split() == ["owner/tiny", "<eos>"]


def test_a_file_that_is_cut_short(tmp_path: Path, saved: tuple[Path, Path]) -> None:
    file, _ = saved
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"backbone\.name_or_path: .*cut\.gguf: can't be loaded: "):
        load_backbone_config(BackboneConfig(name_or_path=str(cut)), str(cut))


def test_without_the_package(saved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"tiny\.gguf is a GGUF file, but gguf is not installed, wanted: pip install"):
        check_available(BackboneConfig(name_or_path=str(saved[0])))


def test_a_transformers_that_reads_the_end_token_wrong(
    saved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.17.0")
    with pytest.raises(InputError, match=r"tiny\.gguf is a GGUF file, .* transformers 5\.17\.0 reads wrong"):
        check_available(BackboneConfig(name_or_path=str(saved[0])))
