"""Studies are read strictly, and every run of theirs is an ordinary recipe."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from hycam.errors import InputError
from hycam.study.recipe import Study, load_study, packaged_studies, parse_study
from hycam.study.units import cells, tuning, units
from hycam_cli import RECIPE_FIELDS, STUDY_FIELDS

_VALUES: dict[str, Any] = {
    "output_dir": "runs/x",
    "seeds": [3, 4],
    "folds": [1, 2],
    "learning_rates": [1e-4, 1e-3],
    "backbones": {"a": {"name_or_path": "x"}, "b": {"scratch": {"steps": 5}}},
    "methods": {
        "lora": {"name": "lora", "r": 8, "learning_rates": [1e-2]},
        "hycam": {"r": 8},
        "coded": {"preset": "released_code", "data": {"train_on_prompt": True}, "trainer": {"weight_decay": 0.05}},
    },
    "tasks": [{"name": "dolly"}],
    "data": {"max_length": 100},
    "trainer": {"max_steps": 7},
    "early_stopping": {"patience": 2},
}


def _parsed(**changes: Any) -> Study:
    return parse_study(copy.deepcopy(_VALUES) | changes, "study.yaml")


def _parsed_with(*overrides: tuple[str, str]) -> Study:
    return parse_study(copy.deepcopy(_VALUES), "study.yaml", overrides)


def test_a_runs_recipe_has_the_studys_sections_and_its_own() -> None:
    study = _parsed()
    recipe = study.recipe("b", "coded", fold=2, seed=4, learning_rate=1e-3, folder="cells/c", weights="w/backbone-1")
    assert (recipe.seed, recipe.data.fold, recipe.output_dir) == (4, 2, "runs/x/cells/c")
    assert recipe.backbone.name_or_path == "w/backbone-1" and recipe.backbone.scratch is None
    assert recipe.method.preset == "released_code" and recipe.data.train_on_prompt
    assert recipe.data.max_length == 100 and recipe.early_stopping.patience == 2
    assert recipe.trainer == {"max_steps": 7, "weight_decay": 0.05, "learning_rate": 1e-3}
    other = study.recipe("a", "hycam", fold=1, seed=3, learning_rate=1e-4, folder="f")
    assert "weight_decay" not in other.trainer and not other.data.train_on_prompt


def test_the_work_of_a_study() -> None:
    study = _parsed()
    folders = [unit.folder for unit in units(study)]
    assert folders[0] == "backbones/b"
    assert folders[1:3] == ["tuning/a/hycam/lr-0.0001", "tuning/a/hycam/lr-0.001"]
    assert not [unit for unit in tuning(study) if unit.method == "lora"]  # one rate needs no choice
    assert {(unit.fold, unit.seed) for unit in tuning(study)} == {(1, 3)}
    assert [unit.folder for unit in cells(study)][:4] == [
        "cells/a/lora/fold1-seed3",
        "cells/a/hycam/fold1-seed3",
        "cells/a/coded/fold1-seed3",
        "cells/a/lora/fold1-seed4",
    ]
    assert len(folders) == len(set(folders)) == 1 + 2 * 2 * 2 + 2 * 3 * 4


def test_the_baselines_are_the_peft_methods_that_are_no_hycam() -> None:
    assert _parsed().candidates() == ["lora"]
    assert _parsed(baselines=["coded"]).candidates() == ["coded"]


def test_a_study_comes_back_from_its_plain_values() -> None:
    study = _parsed(families={"sizes": ["a", "b"]}, keep="nothing")
    assert parse_study(yaml.safe_load(yaml.safe_dump(study.to_dict())), "study.yaml") == study


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "study.yaml: seed: unknown field; did you mean 'seeds'"),
        ({"seeds": []}, "seeds: none given"),
        ({"seeds": [1, 1]}, "seeds: got .1, 1., wanted each once"),
        ({"folds": [5]}, "fold: 5, wanted an integer from 0 to 4"),
        ({"learning_rates": [1e-3, 0.001]}, "learning_rates: .* each once"),
        ({"learning_rates": [0.0]}, "learning_rates: got .0.0., wanted finite numbers above 0"),
        (
            {"methods": {"hycam": {"learning_rates": [-1.0]}}},
            "methods.hycam: learning_rates: got .-1.0., wanted finite",
        ),
        ({"reference": "full"}, "reference: 'full', wanted one of lora, hycam, coded"),
        ({"baselines": ["hycam"]}, "baselines: 'hycam' is the reference"),
        ({"baselines": ["moelora"]}, "baselines: 'moelora', wanted one of"),
        ({"families": {"x": ["c"]}}, "families.x: 'c', wanted one of a, b"),
        ({"keep": "all"}, "keep: got 'all'"),
        ({"backbones": {"a/b": {"name_or_path": "x"}}}, "backbones: 'a/b', wanted a name"),
        ({"backbones": {"a": {}}}, "a, lora: backbone: got neither"),
        ({"methods": {"hycam": {"rr": 4}}}, "a, hycam: method.rr: unknown field"),
        ({"methods": {"hycam": {"learning_rates": []}}}, "methods.hycam.learning_rates: none given"),
        ({"methods": {"hycam": {"trainer": {"max_steps": 9}}}}, "methods.hycam.trainer.max_steps: can't differ"),
        ({"methods": {"hycam": {"data": {"packing": True}}}}, "methods.hycam.data.packing: can't differ"),
        ({"methods": {"hycam": {"backbone": {"name_or_path": "y"}}}}, "methods.hycam.backbone.name_or_path: can't dif"),
        (
            {"methods": {"hycam": {"backbone": "float32"}}},
            "hycam.backbone: got 'float32' .str., wanted a mapping",
        ),
        ({"methods": {"hycam": {"backbone": {"dtype": "int8"}}}}, "a, hycam: backbone.dtype: got 'int8'"),
        (
            {"methods": {"hycam": {"trainer": {"per_device_train_batch_size": 2}}}},
            "methods.hycam.trainer: a step of 2 rows, wanted 8",
        ),
        ({"trainer": {"learning_rate": 1e-3}}, "trainer.learning_rate: set `learning_rates` of the study"),
        ({"trainer": {"seed": 1}}, "a, lora: trainer.seed"),
        ({"trainer": {"eval_strategy": "no"}}, "trainer.eval_strategy: got no, wanted steps or epoch"),
        ({"trainer": {"save_only_model": True}}, "trainer.save_only_model: got true"),
        ({"data": {"fold": 1}}, "data.fold: set `folds` of the study"),
        ({"tasks": []}, "tasks: none given"),
        ({"evaluation": {"batch": 1}}, "evaluation.batch: unknown field"),
    ],
)
def test_names_file_and_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _parsed(**changes)


def test_a_method_may_have_a_dtype_of_its_own() -> None:
    full = {"name": "full", "backbone": {"dtype": "float32"}}
    study = _parsed(
        backbones={"a": {"name_or_path": "x", "dtype": "bfloat16"}}, methods={"hycam": {}, "full": full}, baselines=None
    )
    for method, dtype in (("hycam", "bfloat16"), ("full", "float32")):
        recipe = study.recipe("a", method, fold=1, seed=3, learning_rate=1e-4, folder="f")
        assert (recipe.backbone.dtype, recipe.backbone.name_or_path) == (dtype, "x")
    assert parse_study(study.to_dict(), "again") == study
    assert (study.changes_backbone("full"), study.changes_backbone("hycam")) == (True, False)


def test_a_step_may_be_parted() -> None:
    trainer = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    study = _parsed(methods={"hycam": {}, "full": {"name": "full", "trainer": trainer}})
    recipe = study.recipe("a", "full", fold=1, seed=3, learning_rate=1e-4, folder="f")
    assert recipe.trainer == {"max_steps": 7, "learning_rate": 1e-4} | trainer


def test_overrides_set_any_field(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(_VALUES))
    study = load_study(str(path), [("seeds", "[9]"), ("methods.lora.r", "2"), ("backbones.b.scratch.steps", "6")])
    assert study.seeds == [9] and study.methods["lora"].section["r"] == 2
    assert study.scratch("b").steps == 6
    with pytest.raises(InputError, match="--folds: got 'x'"):
        load_study(str(path), [("folds", "x")])


def test_overrides_reach_names_with_dots_and_hyphens() -> None:
    """The longest name that is there is meant."""
    values = copy.deepcopy(_VALUES) | {
        "backbones": {"llama-3": {"name_or_path": "x"}, "llama-3.2-1b": "llama-3.2-1b"},
        "methods": {"hycam": {}, "my-lora": {"name": "lora"}, "r.8": {"name": "lora", "r": 8}},
    }
    study = parse_study(
        values,
        "study.yaml",
        [
            ("backbones.llama-3.2-1b.dtype", "float32"),
            ("backbones.llama-3.dtype", "bfloat16"),
            ("methods.my-lora.r", "2"),
            ("methods.r.8.r", "3"),
            ("methods.r.8.trainer.weight_decay", "0.5"),
        ],
    )
    assert [section["dtype"] for section in study.backbones.values()] == ["bfloat16", "float32"]
    assert study.backbones["llama-3.2-1b"]["name_or_path"] == "meta-llama/Llama-3.2-1B"
    assert list(study.methods) == ["hycam", "my-lora", "r.8"]
    assert [study.methods[name].section["r"] for name in ("my-lora", "r.8")] == [2, 3]
    assert study.methods["r.8"].trainer == {"weight_decay": 0.5}
    assert _parsed_with(("backbones.a", "llama-3.2-1b")).backbones["a"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("methods.my_lora.r", "--methods.my_lora.r: none of the study's methods, wanted one of lora, hycam, coded"),
        ("methods.lora2", "--methods.lora2: none of the study's methods, wanted one of lora, hycam, coded"),
        ("backbones.c.dtype", "--backbones.c.dtype: none of the study's backbones, wanted one of a, b"),
    ],
)
def test_an_override_adds_no_method_and_no_backbone(name: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        _parsed_with((name, "8"))


def test_the_commands_options_are_the_studys_fields() -> None:
    fields = {item.name for item in dataclasses.fields(Study) if item.init}
    assert fields <= set(RECIPE_FIELDS) | set(STUDY_FIELDS)
    assert set(STUDY_FIELDS) == fields - set(RECIPE_FIELDS)


def test_the_shipped_studies() -> None:
    assert set(packaged_studies()) == {
        "study_laptop",
        "study_laptop_settings",
        "study_small",
        "study_7b",
        "study_settings",
    }
    for name in ("study_small", "study_7b"):
        study = load_study(name)
        methods = {(method.section["name"], method.section.get("preset", "paper")) for method in study.methods.values()}
        assert methods >= {
            *((name, "paper") for name in ("full", "lora", "multilora", "moelora", "riemoe", "hycam")),
            ("multilora", "budget_matched"),
            *(("hycam", name) for name in ("shared_only", "released_code", "full_spec", "spec_only", "inverse_peft")),
        }  # fmt: skip
        assert study.methods["hycam"].section["name"] == "hycam"
        assert all(1 < len(study.rates(method)) <= 4 for method in study.methods)
    settings = load_study("study_settings")
    assert {method.section["name"] for method in settings.methods.values()} == {"lora", "hycam"}
    assert all(len(settings.rates(method)) == 1 for method in settings.methods)
    laptop, changed = load_study("study_laptop"), load_study("study_laptop_settings")
    assert all(getattr(changed, name) == getattr(laptop, name) for name in ("tasks", "data", "trainer", "backbones"))
    small, large = load_study("study_small"), load_study("study_7b")
    assert (small.seeds, small.folds) == ([0, 1, 2], [0])
    assert {task["name"] for task in small.tasks} == {"auto_cot", "icliniq", "dolly", "code_alpaca", "webgpt_standin"}
    paper = large.recipe("llama-2-7b", "hycam", fold=0, seed=0, learning_rate=2e-5, folder="x")
    assert paper.method.adapter_config().r == 64 and paper.data.max_length == 1200
    assert large.folds == [0, 1, 2, 3, 4] and 2e-5 in large.learning_rates
