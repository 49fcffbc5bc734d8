"""A recipe is read strictly: every mistake is one line that names the file or option and the dotted field."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig
from transformers import TrainingArguments

from hycam.adapter.config import HyCAMConfig
from hycam.errors import InputError
from hycam.methods import MoeLoraConfig, MultiLoraConfig
from hycam.training.engines import fsdp_backend, packaged_engines
from hycam.training.recipe import (
    RESERVED_TRAINER_FIELDS,
    TRAINER_DEFAULTS,
    Recipe,
    load_recipe,
    packaged_recipes,
    parse_recipe,
)
from hycam.training.recipe_files import differing_fields
from hycam_cli import RECIPE_FIELDS

_MINIMAL = {"backbone": {"name_or_path": "somewhere"}, "tasks": [{"name": "dolly"}]}


def _parse(**sections: Any) -> Recipe:
    return parse_recipe({**_MINIMAL, **sections}, "my.yaml")


def test_sections_reach_the_settings_they_name() -> None:
    recipe = _parse(
        seed=7,
        output_dir="runs/x",
        method={"preset": "spec_only", "r": 8, "tau": 1, "layers_to_transform": [0, 2]},
        tasks=[{"name": "mine", "source": "m.jsonl", "fields": {"instruction": "q", "output": "a.text"}}],
        data={"max_length": 99, "packing": True},
        trainer={"learning_rate": 1, "lr_scheduler_kwargs": {"num_cycles": 2}, "report_to": "none"},
        early_stopping={"patience": 2},
        evaluation={"generation": True},
    )
    adapter = recipe.method.adapter_config()
    assert (adapter.shared, adapter.r, adapter.layers_to_transform) == ("none", 8, [0, 2])
    assert adapter.tau == 1.0 and isinstance(adapter.tau, float)
    assert recipe.tasks[0].fields == {"instruction": "q", "output": "a.text"}
    assert (recipe.data.max_length, recipe.data.packing, recipe.evaluation.generation) == (99, True, True)
    arguments = recipe.training_arguments()
    assert (arguments.learning_rate, arguments.seed, arguments.output_dir) == (1.0, 7, "runs/x")
    assert arguments.lr_scheduler_kwargs == {"num_cycles": 2}


def test_defaults_are_the_documented_ones() -> None:
    arguments = _parse().training_arguments()
    for name, value in TRAINER_DEFAULTS.items():
        assert getattr(arguments, name) == value
    assert arguments.optim.value.startswith("adamw_torch")
    assert arguments.max_grad_norm == 1.0


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"trainr": {}}, "my.yaml: trainr: unknown field; did you mean 'trainer'?"),
        ({"backbone": {}}, "my.yaml: backbone: got neither of name_or_path and scratch"),
        ({"backbone": {"name_or_path": "x", "scratch": {}}}, "my.yaml: backbone: got both of"),
        ({"backbone": {"name_or_path": 3}}, "my.yaml: backbone.name_or_path: got 3 (int), wanted str or null"),
        (
            {"backbone": {"name_or_path": "x", "dtype": "bf16"}},
            "my.yaml: backbone.dtype: got 'bf16' (str), wanted auto",
        ),
        (
            {"backbone": {"scratch": {"hiden_size": 3}}},
            "my.yaml: backbone.scratch.hiden_size: unknown field; did you mean",
        ),
        ({"backbone": {"scratch": {"steps": 0}}}, "my.yaml: backbone.scratch.steps: got 0"),
        ({"method": {"num_expert": 3}}, "my.yaml: method.num_expert: unknown field; did you mean 'num_experts'?"),
        ({"method": {"num_experts": "5"}}, "my.yaml: method.num_experts: got '5' (str), wanted int"),
        ({"method": {"tau": 0.0}}, "my.yaml: method.tau: got 0.0"),
        ({"method": {"bias": 1}}, "my.yaml: method.bias: got 1 (int), wanted bool"),
        ({"method": {"preset": "papre"}}, "my.yaml: method.preset: got 'papre'"),
        ({"method": {"name": "prefix"}}, "my.yaml: method.name: got 'prefix' (str), wanted hycam | full | lora"),
        ({"method": {"name": "full", "r": 4}}, "my.yaml: method.r: unknown field"),
        ({"method": {"name": "lora", "num_experts": 4}}, "my.yaml: method.num_experts: unknown field"),
        ({"method": {"name": "lora", "preset": "paper"}}, "my.yaml: method.preset: unknown field"),
        ({"method": {"name": "full", "autocast_adapter_dtype": False}}, "my.yaml: method.autocast_adapter_dtype: unkn"),
        ({"method": {"name": "lora", "autocast_adapter_dtype": 1}}, "my.yaml: method.autocast_adapter_dtype: got 1"),
        ({"method": {"name": "lora", "init_lora_weights": "eva"}}, "my.yaml: method.init_lora_weights: unknown field"),
        ({"method": {"name": "lora", "r": 0}}, "my.yaml: method.r: got 0, want an integer of at least 1"),
        ({"method": {"name": "lora", "lora_dropout": 1}}, "my.yaml: method.lora_dropout: got 1"),
        ({"method": {"name": "lora", "target_modules": None}}, "my.yaml: method.target_modules: got null"),
        ({"method": {"name": "lora", "layers_to_transform": [0]}}, "my.yaml: method.layers_to_transform: got [0]"),
        ({"method": {"name": "multilora", "preset": "papre"}}, "my.yaml: method.preset: got 'papre'"),
        ({"method": {"name": "multilora", "num_adapters": 0}}, "my.yaml: method.num_adapters: got 0"),
        ({"method": {"name": "multilora", "lora_alpha": "8"}}, "my.yaml: method.lora_alpha: got '8' (str)"),
        ({"method": {"name": "moelora", "top_k": 6}}, "my.yaml: method.top_k: got 6, want at most num_experts=5"),
        ({"method": {"name": "moelora", "gate_lr_ratio": 0}}, "my.yaml: method.gate_lr_ratio: got 0"),
        ({"method": {"name": "moelora", "delta": 1.0}}, "my.yaml: method.delta: unknown field"),
        ({"method": {"name": "riemoe", "delta": -1}}, "my.yaml: method.delta: got -1"),
        ({"method": {"name": "riemoe", "gate_correction": "x"}}, "my.yaml: method.gate_correction: got 'x' (str)"),
        ({"method": {"peft_type": "LORA"}}, "my.yaml: method.peft_type: unknown field"),
        ({"tasks": {}}, "my.yaml: tasks: got {} (dict), wanted list"),
        ({"tasks": [{"source": "x"}]}, "my.yaml: tasks.0.name: missing"),
        ({"tasks": [{"name": "a"}, {"name": "a"}]}, "my.yaml: tasks: two are named 'a'"),
        ({"tasks": [{"name": "a", "max_rows": 1.5}]}, "my.yaml: tasks.0.max_rows: got 1.5 (float), wanted int or null"),
        ({"data": {"max_length": True}}, "my.yaml: data.max_length: got True (bool), wanted int"),
        ({"data": {"fold": 5}}, "my.yaml: data.fold: 5"),
        ({"data": {"temperature": 0.5}}, "my.yaml: data.temperature: 0.5, wanted a number of 1 or more"),
        ({"data": None}, "my.yaml: data: got None, wanted a mapping"),
        (
            {"trainer": {"learning_rat": 1}},
            "my.yaml: trainer.learning_rat: unknown field; did you mean 'learning_rate'?",
        ),
        ({"trainer": {"learning_rate": "fast"}}, "my.yaml: trainer.learning_rate: got 'fast' (str), wanted float"),
        ({"trainer": {"optim": "adam"}}, "my.yaml: trainer.optim: got 'adam' (str), wanted"),
        ({"trainer": {"seed": 3}}, "my.yaml: trainer.seed: set `seed` at the top"),
        ({"trainer": {"save_on_each_node": True}}, "my.yaml: trainer.save_on_each_node: output_dir must lie where"),
        (
            {"trainer": {"restore_callback_states_from_checkpoint": True}},
            "my.yaml: trainer.restore_callback_states_from_checkpoint: `hycam train --resume` always restores them",
        ),
        (
            {"trainer": {"train_sampling_strategy": "by_length"}},
            "my.yaml: trainer.train_sampling_strategy: got 'by_length', wanted random | sequential | group_by_length",
        ),
        ({"trainer": {"log_level": "loud"}}, "my.yaml: trainer.log_level: got 'loud', wanted"),
        ({"trainer": {"fsdp": "full_shard"}}, "my.yaml: trainer.fsdp: got 'full_shard' (str), wanted bool"),
        ({"early_stopping": {"patience": 0}}, "my.yaml: early_stopping.patience: got 0, wanted at least 1"),
        ({"evaluation": {"batch_size": 0}}, "my.yaml: evaluation.batch_size: got 0, wanted at least 1"),
        ({"seed": "1"}, "my.yaml: seed: got '1' (str), wanted int"),
    ],
)
def test_names_file_and_field(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        _parse(**sections)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_the_methods_and_their_defaults() -> None:
    full, lora, multilora, moelora, riemoe = (
        _parse(method={"name": name}).method for name in ("full", "lora", "multilora", "moelora", "riemoe")
    )
    assert full.adapter_config() is None
    config = lora.adapter_config()
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.target_modules) == (64, 64, "all-linear")
    matched = _parse(method={"name": "multilora", "preset": "budget_matched"}).method.adapter_config()
    assert multilora.adapter_config() == MultiLoraConfig(task_type="CAUSAL_LM")
    assert matched.r * matched.num_adapters == 64
    assert moelora.adapter_config() == MoeLoraConfig(lora_alpha=4 * 64, task_type="CAUSAL_LM")
    assert riemoe.adapter_config() == MoeLoraConfig(
        lora_alpha=4 * 64, gate_correction="engineering", task_type="CAUSAL_LM"
    )
    theoretical = _parse(method={"name": "riemoe", "gate_correction": "theoretical"}).method.adapter_config()
    assert theoretical.gate_correction == "theoretical"
    weight = torch.nn.Parameter(torch.zeros(1))
    assert riemoe.gate_lr_ratio(torch.optim.AdamW([weight])) == 0.003
    assert riemoe.gate_lr_ratio(torch.optim.SGD([weight])) == 0.001
    assert riemoe.delta == 1e-6


def test_another_method_on_the_command_line_starts_its_section_anew() -> None:
    """The file's fields belong to the file's method; the same name changes nothing."""
    values = {**_MINIMAL, "method": {"name": "hycam", "preset": "paper", "num_experts": 8, "r": 16}}

    def parse(*overrides: tuple[str, str]) -> Recipe:
        return parse_recipe(copy.deepcopy(values), "my.yaml", overrides)

    assert parse(("method.r", "8"), ("method.name", "lora")).method.adapter_config().r == 8
    assert parse(("method.name", "multilora")).method.to_dict() == {"name": "multilora", "preset": "paper"}
    assert parse(("method.name", "full")).method.to_dict() == {"name": "full"}
    assert parse(("method", "{r: 4}"), ("method.name", "lora")).method.to_dict() == {"name": "lora", "r": 4}
    kept = parse(("method.name", "hycam")).method.adapter_config()
    assert (kept.num_experts, kept.r) == (8, 16)
    with pytest.raises(InputError, match=r"^--method.num_experts: unknown field"):
        parse(("method.name", "lora"), ("method.num_experts", "3"))
    with pytest.raises(InputError, match=r"^--method.name: got 'lorra' \(str\), wanted hycam"):
        parse(("method.name", "lorra"))


@pytest.mark.parametrize("name", ["full", "lora", "multilora", "moelora", "riemoe"])
def test_a_method_comes_back_from_its_plain_values(name: str) -> None:
    recipe = _parse(method={"name": name} | ({} if name == "full" else {"r": 8}))
    assert parse_recipe(recipe.to_dict(), "again.yaml") == recipe


def test_a_folder_of_ones_home_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert _parse(backbone={"name_or_path": "~/models/one"}).backbone.name_or_path == "/somewhere/models/one"


def test_a_missing_backbone_is_named() -> None:
    with pytest.raises(InputError, match=r"^my.yaml: backbone: missing$"):
        parse_recipe({"tasks": []}, "my.yaml")


def test_contradicting_trainer_fields() -> None:
    recipe = _parse(trainer={"eval_strategy": "steps", "save_strategy": "epoch"})
    with pytest.raises(InputError, match=r"^my.yaml: trainer: .*load_best_model_at_end"):
        recipe.training_arguments()


@pytest.mark.parametrize(
    ("trainer", "strategy", "steps", "best"),
    [
        ({}, "epoch", None, True),
        ({"eval_strategy": "steps", "eval_steps": 50}, "steps", 50, True),
        ({"eval_strategy": "steps", "logging_steps": 7}, "steps", 7, True),
        ({"eval_strategy": "steps", "eval_steps": 50, "save_steps": 100}, "steps", 100, True),
        ({"eval_strategy": "no"}, "epoch", None, False),
        ({"eval_strategy": "no", "save_strategy": "no"}, "no", None, False),
        ({"eval_strategy": "steps", "load_best_model_at_end": False, "save_strategy": "epoch"}, "epoch", None, False),
    ],
)
def test_checkpoints_are_made_where_validations_are(
    trainer: dict[str, Any], strategy: str, steps: int | None, best: bool
) -> None:
    arguments = _parse(trainer=trainer).training_arguments()
    assert (arguments.save_strategy, arguments.load_best_model_at_end) == (strategy, best)
    assert steps is None or arguments.save_steps == steps


def test_a_settings_file_that_is_not_there() -> None:
    recipe = _parse(trainer={"fsdp": True, "fsdp_config": "nowhere/fsdp.json"})
    with pytest.raises(InputError, match=r"^my.yaml: trainer: .*nowhere/fsdp.json"):
        recipe.training_arguments()


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"deepspeed": "zero4"}, "trainer.deepspeed: 'zero4' is neither a file nor one that ships; did you mean 'zero"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"preserve_rng_state": False}},
            "trainer.gradient_checkpointing_kwargs.preserve_rng_state: false given, wanted true",
        ),
        (
            {"fsdp": True, "fsdp_config": {"activation_checkpointing": True}},
            "trainer.fsdp_config.activation_checkpointing: true given, wanted trainer.gradient_checkpointing instead",
        ),
    ],
)
def test_engines_that_would_not_work(trainer: dict[str, Any], message: str) -> None:
    pytest.importorskip("deepspeed")
    with pytest.raises(InputError) as error:
        _parse(trainer=trainer).training_arguments()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("engine", "field"), [("DEEPSPEED", "deepspeed"), ("FSDP", "fsdp")])
def test_an_engine_that_only_the_launcher_names(monkeypatch: pytest.MonkeyPatch, engine: str, field: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(InputError, match=rf"^trainer.{field}: not set, but the launcher asks for {engine}"):
        _parse().training_arguments()


def test_fsdp_on_gpus_can_reduce_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    sharded = {"fsdp": True, "use_cpu": False}
    assert fsdp_backend(sharded) is None  # without a launcher there is no group, as for `hycam eval`
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert fsdp_backend(sharded) == "cpu:gloo,cuda:nccl"
    assert fsdp_backend(sharded | {"use_cpu": True}) is None
    assert fsdp_backend({"use_cpu": False}) is None


def test_the_shipped_engines() -> None:
    """Every stage, with the optimizer's state on the device and in the host's memory."""
    settings = {name: json.loads(path.read_text())["zero_optimization"] for name, path in packaged_engines().items()}
    assert set(settings) == {f"zero{stage}{offload}" for stage in (1, 2, 3) for offload in ("", "_offload")}
    for name, zero in settings.items():
        assert zero["stage"] == int(name[4])
        assert zero.get("offload_optimizer", {}).get("device") == ("cpu" if "offload" in name else None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2\n", ":2: not YAML"),
        ("seed: 1\nseed: 2\n", ":2: not YAML: the key 'seed' comes twice"),
        ("- 1\n", "got list, wanted a mapping"),
        ("", "got NoneType, wanted a mapping"),
        ("seed: !!python/object/apply:os.getcwd []\n", "not YAML: could not determine a constructor"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_recipe(str(path))
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: no such recipe file"):
        load_recipe(str(tmp_path / "none.yaml"))
    with pytest.raises(InputError, match=r"papr: neither a recipe file nor one that ships; did you mean 'paper'\?"):
        load_recipe("papr")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="can't be read"):
        load_recipe(str(binary))


def test_scientific_numbers_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("backbone: {name_or_path: x}\ntrainer: {learning_rate: 2e-5, weight_decay: 1E+0}\n")
    assert load_recipe(str(path)).trainer == {"learning_rate": 2e-5, "weight_decay": 1.0}


def test_overrides_set_any_field() -> None:
    recipe = load_recipe(
        "paper",
        [
            ("seed", "9"),
            ("trainer.learning_rate", "1e-4"),
            ("tasks.1.max_rows", "10"),
            ("method.num_experts", "8"),
            ("early_stopping", "null"),
            ("evaluation.generation", "false"),
            ("trainer.lr_scheduler_kwargs.num_cycles", "0.5"),
        ],
    )
    assert (recipe.seed, recipe.trainer["learning_rate"], recipe.tasks[1].max_rows) == (9, 1e-4, 10)
    assert recipe.method.adapter_config().num_experts == 8
    assert recipe.early_stopping is None and not recipe.evaluation.generation
    assert recipe.trainer["lr_scheduler_kwargs"] == {"num_cycles": 0.5}
    assert load_recipe("paper", [("tasks", "[{name: x}]"), ("tasks.0.source", "y.json")]).tasks[0].source == "y.json"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("trainer.learning_rte", "1", "--trainer.learning_rte: unknown field; did you mean 'learning_rate'?"),
        ("trainer.learning_rate", "fast", "--trainer.learning_rate: got 'fast' (str), wanted float"),
        ("data.fold", "7", "--data.fold: 7"),
        ("tasks.9.max_rows", "1", "--tasks.9.max_rows: 'tasks' is a list of 5, wanted an index instead of '9'"),
        ("tasks.5", "{name: x}", "--tasks.5: 'tasks' is a list of 5"),
        ("seed.x", "1", "--seed.x: 'seed' is 0, which has no fields"),
        ("data", "[", "--data:1: not YAML"),
    ],
)
def test_a_wrong_override_is_named_as_an_option(name: str, text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        load_recipe("paper", [(name, text)])
    assert str(error.value).startswith(message)


def test_apple_gpus_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no float64."""
    trainer = {"report_to": "none"}
    values = _MINIMAL | {"trainer": trainer}
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cpu"))
    for device, use_cpu in (("mps", True), ("xpu", False), (None, True)):
        found = None if device is None else torch.device(device)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda found=found: found is not None)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda found=found: found)
        assert parse_recipe(copy.deepcopy(values), "my.yaml").training_arguments().use_cpu is use_cpu
    monkeypatch.setattr(TrainingArguments, "device", torch.device("mps"))
    with pytest.raises(InputError, match=r"my\.yaml: trainer\.use_cpu: got false, wanted true: an Apple GPU"):
        parse_recipe(_MINIMAL | {"trainer": trainer | {"use_cpu": False}}, "my.yaml").training_arguments()


@pytest.mark.parametrize("name", ["paper", "released_code", "laptop", "demo"])
def test_shipped_recipes_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    recipe.training_arguments()
    again = parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.to_dict())), "again")
    assert again == recipe
    assert set(packaged_recipes()) == {"paper", "released_code", "demo", "laptop"}


def test_the_papers_recipe() -> None:
    recipe = load_recipe("paper")
    adapter, arguments = recipe.method.adapter_config(), recipe.training_arguments()
    assert (adapter.r, adapter.num_experts, adapter.tau, adapter.balance_coef) == (64, 5, 0.5, 0.1)
    assert [task.name for task in recipe.tasks] == ["auto_cot", "icliniq", "dolly", "code_alpaca", "webgpt"]
    assert (arguments.learning_rate, arguments.lr_scheduler_type) == (2e-5, "cosine")
    assert "adamw" in str(arguments.optim).lower()
    assert (recipe.data.max_length, recipe.data.train_on_prompt, recipe.backbone.dtype) == (1200, False, "bfloat16")
    assert recipe.early_stopping is not None
    assert arguments.metric_for_best_model == "loss" and arguments.load_best_model_at_end


def test_the_released_codes_recipe() -> None:
    recipe = load_recipe("released_code")
    adapter, arguments = recipe.method.adapter_config(), recipe.training_arguments()
    assert adapter.to_dict() == HyCAMConfig.preset("released_code", task_type="CAUSAL_LM").to_dict()
    assert adapter.balance_coef == 0
    assert (arguments.adam_beta1, arguments.adam_beta2) == (0.9, 0.95)
    assert (arguments.weight_decay, arguments.max_grad_norm, arguments.seed) == (0.05, 1.0, 2333)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (2, 2)
    assert recipe.data.train_on_prompt and recipe.data.prompt == "alpaca"


def test_any_training_argument_is_a_field() -> None:
    for item in dataclasses.fields(TrainingArguments):
        if not item.init:
            continue
        values = {item.name: item.default}
        if item.default is dataclasses.MISSING:
            continue
        if item.name in RESERVED_TRAINER_FIELDS:
            with pytest.raises(InputError, match=item.name):
                _parse(trainer=values)
        else:
            _parse(trainer=values)


def test_the_commands_options_are_the_recipes_fields() -> None:
    assert set(RECIPE_FIELDS) == {item.name for item in dataclasses.fields(Recipe) if item.init}


def test_differing_fields() -> None:
    old = {"a": {"b": 1, "c": [1, {"d": 2}]}, "e": 3}
    assert differing_fields(old, old) == []
    assert differing_fields(old, {"a": {"b": 2, "c": [1, {"d": 3}]}, "f": 1}) == ["a.b", "a.c.1.d", "e", "f"]
    assert differing_fields(old, {"a": {"b": 1, "c": [1]}, "e": 3}) == ["a.c"]
