"""Every method through `hycam train`: it learns, is measured, saved, resumed, evaluated and generates."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hycam.errors import InputError
from hycam.methods import MoeLoraConfig, MoeLoraLinear, RiemannianPreconditioner
from hycam.training.callbacks import read_metrics
from hycam.training.method import MethodConfig
from hycam.training.recipe import load_recipe
from hycam.training.run import train
from hycam_cli import main
from tests.models import tiny_model
from tests.training.runs import logged_numbers, recipe_values, save_backbone, save_recipe

METHODS = {
    "full": [],
    "lora": ["--method.r", "4"],
    "multilora": ["--method.r", "4", "--method.preset", "budget_matched"],
    "moelora": ["--method.r", "4", "--method.top_k", "2"],
    "riemoe": ["--method.r", "4", "--method.gate_lr_ratio", "0.5", "--method.delta", "1e-4"],
}
ALL = pytest.mark.parametrize("name", METHODS)
# the others differ from these in no line of the run
SOME = pytest.mark.parametrize(
    "name",
    ["full", "riemoe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "multilora", "moelora"))],
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Any:
    """The folder of a run of 8 steps, made once for each method: from a HyCAM recipe, by the command line alone."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = save_recipe(folder, recipe_values(folder, backbone, trainer={"learning_rate": 3e-3}))
    done: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in done:
            made = folder / name
            options = ["--method.name", name, *METHODS[name], "--output_dir", str(made)]
            assert main(["train", str(recipe), *options]) == 0
            done[name] = made
        return done[name]

    return run


def trained(run: Path) -> Path:
    return run / ("model" if (run / "model").is_dir() else "adapter")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    name = "adapter_model" if (folder / "adapter_config.json").is_file() else "model"
    return load_file(folder / f"{name}.safetensors")


@ALL
def test_it_trains_and_is_measured(runs: Any, name: str, backbone: Path) -> None:
    run = runs(name)
    results = json.loads((run / "results.json").read_text())
    base, adapted = (results["test"][key]["overall"]["perplexity"] for key in ("base", "adapted"))
    assert math.isfinite(base) and adapted < base
    assert "expert_load" not in results
    assert results["recipe"]["method"]["name"] == name
    share = results["parameters"]["trainable"] / results["parameters"]["total"]
    assert share == 1 if name == "full" else 0 < share < 0.6
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert not any(line.get("layers") or "balance_loss" in line for line in lines)
    assert {path.name for path in (run / "plots").iterdir()} == {"loss.png"}
    assert not list(run.rglob("*.bin"))


def test_the_base_column_is_the_untouched_backbone_for_every_method(runs: Any) -> None:
    columns = [json.loads((runs(name) / "results.json").read_text())["test"]["base"] for name in ("full", "lora")]
    assert columns[0]["overall"]["nll"] == columns[1]["overall"]["nll"]


@ALL
def test_what_is_saved_reloads(runs: Any, name: str, backbone: Path) -> None:
    """An adapter into the backbone; a whole model by itself, with its tokenizer."""
    run = runs(name)
    assert (run / "adapter").is_dir() != (run / "model").is_dir()
    state = weights(trained(run))
    if name == "full":
        model = AutoModelForCausalLM.from_pretrained(run / "model")
        assert AutoTokenizer.from_pretrained(run / "model").eos_token == "<eos>"
        before = weights(backbone)
        assert state.keys() == before.keys()
        assert not any(torch.equal(weight, before[key]) for key, weight in state.items())
        live = model.state_dict()
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(backbone), run / "adapter")
        live = get_peft_model_state_dict(model)
    assert state and all(torch.equal(live[key], weight) for key, weight in state.items())
    for checkpoint in run.glob("checkpoint-*"):
        assert weights(checkpoint).keys() == state.keys()


@SOME
def test_resuming_is_the_undisturbed_run(runs: Any, name: str, tmp_path: Path) -> None:
    """From the checkpoint at half the way, bit for bit, the optimizer's own groups and hook included."""
    straight, resumed = runs(name), tmp_path / "run"
    shutil.copytree(straight, resumed)
    for gone in ("checkpoint-8", trained(straight).name, "plots"):
        shutil.rmtree(resumed / gone)
    (resumed / "results.json").unlink()
    train(load_recipe(str(resumed)), resume=True)
    assert logged_numbers(resumed) == logged_numbers(straight)
    got, want = weights(trained(resumed)), weights(trained(straight))
    assert all(torch.equal(got[key], weight) for key, weight in want.items())


@SOME
def test_resuming_a_finished_run_measures_it_again(runs: Any, name: str, tmp_path: Path) -> None:
    shutil.copytree(runs(name), tmp_path / "run")
    results = train(load_recipe(str(tmp_path / "run")), resume=True)
    want = json.loads((runs(name) / "results.json").read_text())
    assert results["test"] == want["test"]


@SOME
def test_eval_and_generate(runs: Any, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs(name)
    results = json.loads((run / "results.json").read_text())["test"]
    assert main(["eval", str(run), "--no-generation"]) == 0
    assert main(["eval", str(run), "--no-generation", "--base"]) == 0
    for key, file in (("adapted", "eval-test.json"), ("base", "eval-base-test.json")):
        report = json.loads((run / file).read_text())
        assert report["overall"]["nll"] == pytest.approx(results[key]["overall"]["nll"], rel=1e-6)
    checkpoint = run / "checkpoint-8"
    capsys.readouterr()
    options = ["--prompt", "Say the colour of cat 3", "--evaluation.max_new_tokens", "5"]
    for arguments in ([str(run)], [str(run), "--adapter", str(checkpoint)], ["--adapter", str(trained(run))]):
        assert main(["generate", *arguments, *options]) == 0
    answers = capsys.readouterr().out.splitlines()
    assert answers


def test_eval_of_a_missing_model_names_the_folder(
    runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs("full"), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    assert main(["eval", str(tmp_path / "run")]) == 2
    assert f"{tmp_path / 'run'}: the run has not ended" in capsys.readouterr().err


def test_riemoe_steps_with_conditioned_gradients_and_slow_gates(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer's own optimizer has the gates' group and runs the hook, once a step."""
    import hycam.training.trainer as module

    calls, groups = [], []
    original, create = RiemannianPreconditioner.__call__, module.HyCAMTrainer.create_optimizer
    monkeypatch.setattr(
        RiemannianPreconditioner, "__call__", lambda self, *a: (calls.append(self.delta), original(self, *a))[1]
    )

    def created(self: Any, *arguments: Any) -> Any:
        optimizer = create(self, *arguments)
        gates = {
            id(p) for m in self.adapted.modules() if isinstance(m, MoeLoraLinear) for p in m.moelora_gate.parameters()
        }
        groups.append([(group["lr"], {id(p) in gates for p in group["params"]}) for group in optimizer.param_groups])
        return optimizer

    monkeypatch.setattr(module.HyCAMTrainer, "create_optimizer", created)
    method = {"name": "riemoe", "r": 4, "gate_lr_ratio": 0.25, "delta": 1e-3}
    values = recipe_values(tmp_path, backbone) | {"method": method}
    values["trainer"] |= {"max_steps": 3, "gradient_accumulation_steps": 2, "learning_rate": 4e-3}
    recipe = load_recipe(str(save_recipe(tmp_path, values)))
    assert recipe.method.adapter_config().gate_correction == "engineering"
    train(recipe)
    assert calls == [1e-3] * 3
    rates = {rate: kinds for rate, kinds in groups[0] if kinds}
    assert rates == {4e-3: {False}, 1e-3: {True}}


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("riemoe", "deepspeed", r"method.name: riemoe preconditions whole gradients, wanted no trainer.deepspeed"),
        ("riemoe", "fsdp", r"method.name: riemoe preconditions whole gradients, wanted no .* or trainer.fsdp"),
        ("full", "deepspeed", r"method.name: full is measured before its training too, wanted no ZeRO-3"),
        ("full", "fsdp", r"method.name: full is measured before its training too, wanted no ZeRO-3 .* no trainer.fsdp"),
    ],
)
def test_methods_that_need_whole_weights_refuse_parts(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch, name: str, setting: str, message: str
) -> None:
    """The engines are set after the fact: building them would leave their global state in this process."""
    import hycam.training.prepare as module

    def load(*arguments: Any) -> None:
        raise AssertionError("the model was loaded")

    values = recipe_values(tmp_path, backbone) | {"method": {"name": name}}
    recipe = load_recipe(str(save_recipe(tmp_path, values)))
    arguments = recipe.training_arguments()
    setattr(arguments, setting, {"stage": 3})
    monkeypatch.setattr(type(recipe), "training_arguments", lambda self: arguments)
    monkeypatch.setattr(module, "is_deepspeed_zero3_enabled", lambda: setting == "deepspeed")
    monkeypatch.setattr(module, "load_model", load)
    with pytest.raises(InputError, match=message):
        train(recipe)


@pytest.mark.parametrize("name", ["moelora", "riemoe"])
def test_the_published_ratios_are_the_defaults(name: str) -> None:
    """Of RieMoE-LoRA's training script: alpha / r = 4, gates at 0.003 of the experts' rate, with SGD at 0.001."""
    config = MethodConfig(name, options={"r": 8}).adapter_config()
    assert isinstance(config, MoeLoraConfig) and config.scaling == 4.0
    assert MethodConfig(name, options={"r": 8, "lora_alpha": 8}).adapter_config().scaling == 1.0
    for kind, ratio in ((torch.optim.AdamW, 0.003), (torch.optim.SGD, 0.001)):
        model = get_peft_model(tiny_model(), config)
        optimizer = kind((p for p in model.parameters() if p.requires_grad), lr=1.0)
        MethodConfig(name).prepare_optimizer(optimizer, model)
        rates = {group["lr"] for group in optimizer.param_groups}
        assert rates == {1.0, ratio}
