"""What a run does, learns and leaves in its folder; and what stops it."""

import json
import math
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hycam.data.collation import Collator
from hycam.errors import InputError, RunStoppedError
from hycam.evaluation.perplexity import evaluate_perplexity
from hycam.training import trainer as trainer_module
from hycam.training.backbone import load_model, load_tokenizer
from hycam.training.callbacks import Throughput, read_metrics
from hycam.training.recipe import Recipe
from hycam.training.run import _validation_rows, train
from hycam.training.tasks import load_rows, tokenize_split
from hycam.training.trainer import HyCAMTrainer
from hycam_cli import main
from tests.training.runs import rows, run_recipe, save_rows


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=_no_constants) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _no_constants(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> tuple[Recipe, dict[str, Any]]:
    """A run of 30 steps with two accumulated micro-batches and generation at its end."""
    recipe = run_recipe(
        tmp_path_factory.mktemp("done"),
        backbone,
        trainer={"max_steps": 30, "eval_steps": 10, "save_steps": 10, "save_total_limit": 2, "report_to": "tensorboard"}
        | {"gradient_accumulation_steps": 2, "warmup_steps": 3, "learning_rate": 3e-2},
        evaluation={"generation": True, "max_new_tokens": 8, "max_generation_rows": 2},
    )
    return recipe, train(recipe)


def test_it_learns_and_reports_every_task(done: tuple[Recipe, dict[str, Any]]) -> None:
    recipe, results = done
    assert json.loads((recipe.output_path / "results.json").read_text()) == json.loads(json.dumps(results))
    base, adapted = results["test"]["base"], results["test"]["adapted"]
    for report in (base, adapted):
        assert set(report["tasks"]) == {"colours", "animals"}
        for result in (*report["tasks"].values(), report["overall"]):
            assert result["perplexity"] == pytest.approx(math.exp(result["nll"] / result["tokens"]))
            assert {"bleu4", "rougeL", "rows"} <= result.keys()
        assert report["overall"]["tokens"] == sum(result["tokens"] for result in report["tasks"].values())
    assert adapted["overall"]["perplexity"] < 0.5 * base["overall"]["perplexity"]
    assert results["steps"] == 30
    loads = results["expert_load"]
    assert set(loads) == {"colours", "animals"}
    for layers in loads.values():
        assert len(layers) == 2
        assert all(sum(load) == pytest.approx(1) for load in layers.values())
    plots = {path.name for path in (recipe.output_path / "plots").iterdir()}
    assert plots == {"loss.png", "expert_load.png", "modulation.png"}


def test_the_base_column_is_the_untouched_backbone(done: tuple[Recipe, dict[str, Any]], backbone: Path) -> None:
    recipe, results = done
    tokenizer = load_tokenizer(recipe.backbone, str(backbone))
    tokenized = tokenize_split(load_rows(recipe.tasks, recipe.data), "test", tokenizer, recipe.data)
    report = evaluate_perplexity(
        AutoModelForCausalLM.from_pretrained(backbone), tokenized, Collator(tokenizer.pad_token_id)
    )
    assert results["test"]["base"]["overall"]["nll"] == report["overall"]["nll"]


def test_metrics_file(done: tuple[Recipe, dict[str, Any]]) -> None:
    recipe, _ = done
    lines = _lines(recipe.output_path)
    assert lines == read_metrics(recipe.output_path / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 31))
    assert [line["learning_rate"] for line in training[:4]] == pytest.approx([0, 1e-2, 2e-2, 3e-2])
    for line in training:
        assert len(line["layers"]) == 2
        for layer in line["layers"].values():
            assert sum(layer["load"]) == pytest.approx(1, abs=1e-5)
        mean = sum(layer["balance_loss"] for layer in line["layers"].values()) / 2
        assert line["balance_loss"] == pytest.approx(mean)
    validation = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in validation] == [10, 20, 30]
    for line in validation:
        assert line["eval_perplexity"] == pytest.approx(math.exp(line["eval_loss"]))
        assert line["eval_colours_perplexity"] == pytest.approx(math.exp(line["eval_colours_loss"]))
        assert min(line["eval_colours_loss"], line["eval_animals_loss"]) < line["eval_loss"]
        assert line["eval_loss"] < max(line["eval_colours_loss"], line["eval_animals_loss"])
    assert list((recipe.output_path / "runs").rglob("events.out.tfevents.*"))


def test_what_a_step_took_is_logged(done: tuple[Recipe, dict[str, Any]]) -> None:
    recipe, _ = done
    for line in (line for line in _lines(recipe.output_path) if "loss" in line):
        assert line["tokens_per_second"] > 0
        assert 0 <= line["padding_share"] < 1
        assert line["peak_bytes"] > 2**20


def test_a_step_of_a_stream_without_a_target_changes_nothing(tmp_path: Path, backbone: Path) -> None:
    """Every other row has a prompt that leaves no room: a step of such a row has no loss and no gradient."""
    long = [row | {"instruction": f"{row['instruction']} {'and so on ' * 20}"} for row in rows(40, offset=40)]
    mixed = [row for pair in zip(rows(40), long, strict=True) for row in pair]
    recipe = run_recipe(
        tmp_path,
        backbone,
        tasks=[{"name": "colours", "source": str(save_rows(tmp_path / "mixed.jsonl", mixed))}],
        data={"streaming": {}},
        method={"balance_coef": 0.0},
        trainer={"per_device_train_batch_size": 1, "max_steps": 12, "eval_steps": 6, "save_steps": 6},
    )
    train(recipe)
    training = [line for line in _lines(recipe.output_path) if "loss" in line]
    assert len(training) == 12
    empty = [line for line in training if line["loss"] == 0]
    assert 2 < len(empty) < 10
    assert all(line["grad_norm"] == 0 for line in empty)


def test_throughput_counts_tokens_without_padding() -> None:
    throughput = Throughput()
    ids = torch.zeros(2, 5, dtype=torch.int64)
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])}
    for _ in range(2):  # the second time from nothing
        throughput.begin()
        throughput.count([padded, {"input_ids": ids}])
        time.sleep(0.05)
        throughput.on_step_end(*[None] * 3)
        time.sleep(0.2)  # a validation, say
        took = throughput.take(torch.device("cpu"))
        assert took["padding_share"] == pytest.approx(3 / 20)
        assert 17 / 0.15 < took["tokens_per_second"] <= 17 / 0.05


def test_counting_reads_nothing_back_from_the_device() -> None:
    """A tensor without data can't be read: reading one on a GPU would wait for all that is queued there."""
    batch = {name: torch.zeros(2, 5, dtype=torch.int64, device="meta") for name in ("input_ids", "attention_mask")}
    throughput = Throughput()
    throughput.count([batch, batch])
    assert throughput.positions == 20


def test_a_process_that_saves_nothing_touches_no_file(tmp_path: Path) -> None:
    trainer = object.__new__(HyCAMTrainer)
    trainer.args = SimpleNamespace(should_save=False)
    trainer.is_distributed_loading_by_transformers = False
    (tmp_path / "training_args.bin").touch()
    trainer._save(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["training_args.bin"]


def test_checkpoints_hold_the_adapter_alone(done: tuple[Recipe, dict[str, Any]]) -> None:
    recipe, _ = done
    checkpoints = sorted(path.name for path in recipe.output_path.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-20", "checkpoint-30"]
    for name in checkpoints:
        files = {path.name for path in (recipe.output_path / name).iterdir()}
        assert files == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
            "files.json",
            "trainer_state.json",
        }
        weights = load_file(recipe.output_path / name / "adapter_model.safetensors")
        assert len(weights) == 2 * 5
        assert all(".self_attn.hycam_" in key for key in weights)
        for pickled in ("optimizer.pt", "scheduler.pt"):
            torch.load(recipe.output_path / name / pickled, weights_only=True)


def _script_validation(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Let the validations of a run see these losses in turn."""
    import hycam.training.trainer as module

    reported = iter(losses)

    def evaluate(*args: Any, **kwargs: Any) -> dict[str, Any]:
        loss = next(reported)
        result = {"nll": 10 * loss, "tokens": 10, "perplexity": math.exp(loss)}
        return {"tasks": {"colours": result, "animals": result}, "overall": result}

    monkeypatch.setattr(module, "evaluate_perplexity", evaluate)


def test_the_saved_adapter_is_the_best_checkpoint(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _script_validation(monkeypatch, [5.0, 4.0, 4.5, 4.25])
    recipe = run_recipe(tmp_path, backbone, trainer={"eval_steps": 2, "save_steps": 2, "save_total_limit": 2})
    results = train(recipe)
    assert (results["steps"], results["best_step"]) == (8, 4)
    saved = load_file(recipe.output_path / "adapter" / "adapter_model.safetensors")
    best = load_file(recipe.output_path / "checkpoint-4" / "adapter_model.safetensors")
    last = load_file(recipe.output_path / "checkpoint-8" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in best.items())
    assert not all(torch.equal(saved[name], weight) for name, weight in last.items())


def test_a_validation_measures_some_rows_of_each_task(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, list[list[int]]]] = []

    def evaluate(model: Any, tasks: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        seen.append({name: dataset["input_ids"][:] for name, dataset in tasks.items()})
        return evaluate_perplexity(model, tasks, *args, **kwargs)

    monkeypatch.setattr(trainer_module, "evaluate_perplexity", evaluate)
    recipe = run_recipe(
        tmp_path, backbone, trainer={"max_steps": 1, "eval_steps": 1}, evaluation={"max_validation_rows": 3}
    )
    train(recipe)
    tokenizer = load_tokenizer(recipe.backbone, str(backbone))
    whole = tokenize_split(load_rows(recipe.tasks, recipe.data), "validation", tokenizer, recipe.data)
    (measured,) = seen
    counts = {name: len(dataset) for name, dataset in whole.items()}
    assert min(counts.values()) > 5
    for name, dataset in whole.items():
        assert measured[name] == [dataset["input_ids"][row] for row in (0, counts[name] // 3, counts[name] * 2 // 3)]
    # the best checkpoint is chosen on the same rows all the time
    recipe.evaluation.max_validation_rows = None
    with pytest.raises(InputError, match=r"evaluation\.max_validation_rows"):
        train(recipe, resume=True)


def test_a_task_of_fewer_validation_rows_is_measured_whole() -> None:
    rows = {"few": Dataset.from_dict({"i": range(3)}), "many": Dataset.from_dict({"i": range(10)})}
    chosen = {name: dataset["i"][:] for name, dataset in _validation_rows(rows, 4).items()}
    assert chosen == {"few": [0, 1, 2], "many": [0, 2, 5, 7]}


def test_early_stopping_ends_the_run_and_resuming_keeps_it_ended(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _script_validation(monkeypatch, [5.0, 4.0, 3.95, 4.0])
    recipe = run_recipe(
        tmp_path,
        backbone,
        trainer={"max_steps": 40, "eval_steps": 2, "save_steps": 2},
        early_stopping={"patience": 2, "threshold": 0.1},
    )
    results = train(recipe)
    assert (results["steps"], results["best_step"]) == (8, 6)
    assert train(recipe, resume=True)["steps"] == 8


def test_the_same_seed_gives_the_same_run(tmp_path: Path, backbone: Path) -> None:
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = tmp_path / name
        folder.mkdir()
        recipe = run_recipe(folder, backbone, seed=seed, trainer={"max_steps": 3})
        train(recipe)
        runs.append([line["loss"] for line in _lines(recipe.output_path) if "loss" in line])
    assert runs[0] == runs[1] != runs[2]


def test_a_nan_loss_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that of a micro-batch which is not the step's last."""
    trainer = {"max_steps": 20, "save_steps": 2, "eval_steps": 2, "gradient_accumulation_steps": 2}
    recipe = run_recipe(tmp_path, backbone, trainer=trainer)
    import hycam.training.trainer as module

    step = module.Trainer.training_step

    def broken(self, model, inputs, *args, **kwargs):
        loss = step(self, model, inputs, *args, **kwargs)
        return loss * math.nan if self.state.global_step == 4 and not self.accelerator.sync_gradients else loss

    with monkeypatch.context() as patch:
        patch.setattr(module.Trainer, "training_step", broken)
        with pytest.raises(
            RunStoppedError, match=r"the loss is nan at step 5; the last good .*checkpoint-4$"
        ) as stopped:
            train(recipe)
    assert stopped.value.exit_status == 1
    assert not (recipe.output_path / "adapter").exists()
    assert all(line["step"] <= 4 for line in _lines(recipe.output_path))
    weights = load_file(recipe.output_path / "checkpoint-4" / "adapter_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = run_recipe(tmp_path, backbone, trainer={"max_steps": 4, "save_steps": 1, "eval_steps": 1})
    import hycam.training.trainer as module

    step = module.Trainer.training_step

    def broken(self, model, inputs, *args, **kwargs):
        loss = step(self, model, inputs, *args, **kwargs)
        if self.state.global_step == 2:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[3] = math.inf
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(module.Trainer, "training_step", broken)
        with pytest.raises(RunStoppedError, match=r"gradient is not finite at step 3; .*checkpoint-2$"):
            train(recipe)


def test_a_diverging_run_saves_no_broken_state(tmp_path: Path, backbone: Path) -> None:
    recipe = run_recipe(
        tmp_path,
        backbone,
        trainer={"learning_rate": 1e30, "lr_scheduler_type": "constant", "warmup_steps": 0}
        | {"eval_steps": 1, "save_steps": 1},
    )
    with pytest.raises(RunStoppedError, match=r"not finite|is nan|is inf"):
        train(recipe)
    for path in recipe.output_path.glob("checkpoint-*/adapter_model.safetensors"):
        assert all(weight.isfinite().all() for weight in load_file(path).values())


@pytest.mark.parametrize("preset", ["released_code", "shared_only", "spec_only", "inverse_peft"])
def test_every_form_of_the_adapter_trains(tmp_path: Path, backbone: Path, preset: str) -> None:
    recipe = run_recipe(
        tmp_path, backbone, method={"preset": preset}, trainer={"max_steps": 2, "eval_steps": 2, "save_steps": 2}
    )
    results = train(recipe)
    assert math.isfinite(results["test"]["adapted"]["overall"]["perplexity"])
    assert ("expert_load" in results) == (preset != "shared_only")


def test_gradient_checkpointing_changes_no_loss(tmp_path: Path, backbone: Path) -> None:
    losses = []
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        folder = tmp_path / name
        folder.mkdir()
        recipe = run_recipe(folder, backbone, trainer={"max_steps": 3, "gradient_checkpointing": checkpointing})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            train(recipe)
        losses.append([line["loss"] for line in _lines(recipe.output_path) if "loss" in line])
    assert losses[0] == losses[1]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a program begins with no memory of its parent's")
def test_the_peak_is_the_process_s_own() -> None:
    """Not that of the program which started it: on Linux `ru_maxrss` goes on from there."""
    code = "import torch; from hycam.training.callbacks import _peak_bytes; print(_peak_bytes(torch.device('cpu')))"
    own = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    held = torch.zeros(own + 2**29, dtype=torch.uint8).fill_(1)
    again = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert held[-1] == 1 and again == pytest.approx(own, rel=0.2)


def test_the_log_tells_what_the_time_went_to(tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation and a checkpoint that take long are told as such, and not as steps."""
    measured = trainer_module.evaluate_perplexity

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.4)
        return measured(*args, **kwargs)

    monkeypatch.setattr(trainer_module, "evaluate_perplexity", slowly)
    recipe = run_recipe(tmp_path, backbone, trainer={"max_steps": 4, "eval_steps": 2, "save_steps": 4})
    train(recipe, test=False)
    end = next(line for line in _lines(recipe.output_path) if "train_runtime" in line)
    assert 2 * 0.4 < end["validation_seconds"] < end["train_runtime"]
    assert end["checkpoints_seconds"] > 0 and 0 < end["steps_seconds"] < end["train_runtime"] - 2 * 0.4
    spent = end["steps_seconds"] + end["validation_seconds"] + end["checkpoints_seconds"]
    assert spent <= end["train_runtime"]


def test_label_smoothing_leaves_the_balance_loss_its_weight(tmp_path: Path, backbone: Path) -> None:
    """A step of SGD on the router, whose gradient is the balance loss's; the loss is one mean over a step's tokens."""
    trainer = {"max_steps": 1, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    trainer |= {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "warmup_steps": 0}
    trainer |= {"max_grad_norm": 0.0}
    routers, losses = [], []
    for factor, rows_at_once, accumulated in ((0.0, 2, 4), (0.3, 2, 4), (0.3, 8, 1)):
        folder = tmp_path / f"{factor}-{accumulated}"
        folder.mkdir()
        batches = {"per_device_train_batch_size": rows_at_once, "gradient_accumulation_steps": accumulated}
        recipe = run_recipe(
            folder,
            backbone,
            trainer=trainer | batches | {"label_smoothing_factor": factor},
            method={"balance_coef": 1e4, "noise": "never"},
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*the balance loss")
            train(recipe, test=False)
        weights = load_file(recipe.output_path / "adapter" / "adapter_model.safetensors")
        routers.append({name: weight for name, weight in weights.items() if "router" in name})
        losses.append(_lines(recipe.output_path)[0]["loss"])
    plain, smoothed, _ = routers
    assert plain
    for name, weight in plain.items():
        assert weight.abs().max() > 1.0
        torch.testing.assert_close(smoothed[name], weight, rtol=1e-2, atol=1e-2)
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)
    assert losses[1] != losses[0]


def test_everything_is_measured_in_the_precision_of_training(tmp_path: Path, backbone: Path) -> None:
    """At the end of training, by `hycam eval`, and on resuming what is finished: bf16 autocast, responses too."""
    trainer = {"bf16": True, "max_steps": 4, "logging_steps": 4}
    recipe = run_recipe(
        tmp_path,
        backbone,
        trainer=trainer,
        evaluation={"generation": True, "max_new_tokens": 8, "max_generation_rows": 4},
    )
    measured = train(recipe)["test"]
    for options, name in (([], "adapted"), (["--base"], "base")):
        output = tmp_path / f"{name}.json"
        assert main(["eval", str(recipe.output_path), *options, "--output", str(output)]) == 0
        found = json.loads(output.read_text())
        assert {key: found[key] for key in ("tasks", "overall")} == measured[name]
    assert train(recipe, resume=True)["test"] == measured
    output = tmp_path / "plain.json"
    assert main(["eval", str(recipe.output_path), "--trainer.bf16", "false", "--output", str(output)]) == 0
    assert json.loads(output.read_text())["overall"]["nll"] != measured["adapted"]["overall"]["nll"]


def test_overwrite_deletes_a_run_and_nothing_else(tmp_path: Path, backbone: Path) -> None:
    recipe = run_recipe(tmp_path, backbone, trainer={"max_steps": 1, "save_steps": 1, "eval_steps": 1})
    train(recipe)
    (recipe.output_path / "backbone-kept").mkdir()
    for name in ("results.partial", "eval-test.json"):
        (recipe.output_path / name).write_text("{}")
    (recipe.output_path / "checkpoint-99").mkdir()
    train(recipe, overwrite=True)
    assert (recipe.output_path / "backbone-kept").is_dir()
    for name in ("results.partial", "eval-test.json", "checkpoint-99"):
        assert not (recipe.output_path / name).exists()
    (recipe.output_path / "other/checkpoint-1").mkdir(parents=True)
    (recipe.output_path / "notes.md").write_text("years of work")
    before = sorted(recipe.output_path.rglob("*"))
    with pytest.raises(InputError, match=r"--overwrite: .*run holds more than a run: notes\.md, other$"):
        train(recipe, overwrite=True)
    assert sorted(recipe.output_path.rglob("*")) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    recipe.output_dir = str(foreign)
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(InputError, match="has files but no run in it"):
            train(recipe, **options)
    assert (foreign / "thesis.tex").exists()
    recipe.output_dir = str(foreign / "thesis.tex")
    with pytest.raises(InputError, match="is a file, wanted a folder"):
        train(recipe)


def test_dtype_and_attention_reach_the_backbone(tmp_path: Path, backbone: Path) -> None:
    recipe = run_recipe(tmp_path, backbone, backbone={"dtype": "bfloat16", "attn_implementation": "eager"})
    model = load_model(recipe.backbone, str(backbone))
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_rows_that_are_cut_are_reported(tmp_path: Path, backbone: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = [row | {"output": "a very long answer " * 20} for row in rows(30)]
    tasks = [{"name": "long", "source": str(save_rows(tmp_path / "long.jsonl", long))}]
    recipe = run_recipe(tmp_path, backbone, tasks=tasks, trainer={"max_steps": 1, "save_steps": 1, "eval_steps": 1})
    train(recipe)
    assert "long, train split: of" in caplog.text
    assert "were cut to data.max_length=64" in caplog.text
