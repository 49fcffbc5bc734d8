"""What a run refuses, before any work is lost."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hycam.errors import InputError
from hycam.training.backbone import load_model, load_tokenizer
from hycam.training.method import MethodConfig
from hycam.training.run import train
from tests.training.runs import rows, run_recipe, save_rows, save_tokenizer


def _without_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where weights would be loaded: the checks must come before."""
    import hycam.training.prepare as module

    def load(*args: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(module, "load_model", load)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"tasks": []}, "tasks: none given"),
        ({"tasks": [{"name": "nowhere", "source": "nowhere.jsonl"}]}, "nowhere.jsonl"),
        ({"data": {"max_length": 129}}, "data.max_length: 129 given, the backbone has 128 positions"),
        (
            {"method": {"backend": "triton"}},
            "method.backend: got triton, wanted auto or torch: the triton backend can't run",
        ),
        ({"method": {"preset": "full_spec", "backend": "triton"}}, "method.backend: got triton, wanted auto or torch"),
        ({"backbone": {"name_or_path": "./no-such-backbone"}}, "backbone.name_or_path: ./no-such-backbone: can't be"),
        ({"backbone": {"revision": "v2"}}, "backbone.revision: got 'v2' for the folder"),
        ({"backbone": {"pad_token": "<none>"}}, "backbone.pad_token: '<none>' is no token of"),
        ({"backbone": {"liger": True}}, "backbone.liger: liger_kernel is not installed"),
        (
            {"backbone": {"attn_implementation": "flash_attention_2"}},
            "attn_implementation: flash_attn is not installed",
        ),
        ({"backbone": {"liger": True}, "method": {"fuse_norm": True}}, "method.fuse_norm: got true"),
        (
            {"backbone": {"liger": True}, "trainer": {"label_smoothing_factor": 0.1}},
            "trainer.label_smoothing_factor: n",
        ),
        (
            {"early_stopping": {"patience": 1}, "trainer": {"eval_strategy": "no", "load_best_model_at_end": False}},
            "early_",
        ),
        ({"evaluation": {"generation": True, "max_new_tokens": 120}}, "evaluation.max_new_tokens: 120 given"),
        ({"data": {"streaming": {}}, "trainer": {"max_steps": -1}}, "trainer.max_steps: none given, wanted the number"),
        (
            {"data": {"streaming": {"weights": {"colors": 2.0}}}},
            "data.streaming.weights: got 'colors'; did you mean 'colours'?",
        ),
        ({"data": {"streaming": {}}, "trainer": {"eval_strategy": "epoch", "save_strategy": "epoch"}}, "eval_strategy"),
        (
            {"data": {"streaming": {}}, "trainer": {"save_strategy": "epoch", "load_best_model_at_end": False}},
            "trainer.save_strategy: got epoch, wanted steps (or no)",
        ),
        (
            {"data": {"streaming": {}}, "trainer": {"train_sampling_strategy": "group_by_length"}},
            "trainer.train_sampling_strategy: got group_by_length, wanted random with data.streaming",
        ),
        (
            {"data": {"streaming": {}}, "trainer": {"accelerator_config": {"dispatch_batches": True}}},
            "trainer.accelerator_config.dispatch_batches: got true, wanted false",
        ),
        ({"data": {"streaming": {"shuffle_bufer": 8}}}, "data.streaming.shuffle_bufer"),
        (
            {"data": {"streaming": {}}, "trainer": {"auto_find_batch_size": True}},
            "trainer.auto_find_batch_size: got true, wanted false",
        ),
        (
            {"data": {"streaming": {}}, "trainer": {"ignore_data_skip": True}},
            "trainer.ignore_data_skip: got true, wanted false",
        ),
        ({"trainer": {"fsdp": True}}, "trainer.fsdp: needs a launcher, for one process too: torchrun --standalone"),
    ],
)
def test_wrong_input_is_found_before_the_model_is_loaded(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], message: str
) -> None:
    _without_model(monkeypatch)
    if "liger" in message or "flash" in message:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError) as error:
        train(run_recipe(tmp_path, backbone, **sections))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (MethodConfig(options={"target_modules": "nothing"}), r"^method: .*nothing"),
        (MethodConfig(options={"layers_to_transform": [7]}), r"^method: .*7"),
        (MethodConfig("lora", options={"target_modules": ["nothing"]}), r"^method: .*nothing"),
        (MethodConfig("moelora", options={"target_modules": ["nothing"]}), r"^method: .*nothing"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_loading(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch, method: MethodConfig, message: str
) -> None:
    _without_model(monkeypatch)
    recipe = run_recipe(tmp_path, backbone)
    recipe.method = method
    with pytest.raises(InputError, match=message):
        train(recipe)
    assert not (tmp_path / "run").exists()


def test_the_metric_of_the_best_checkpoint(tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = run_recipe(tmp_path, backbone, trainer={"metric_for_best_model": "animals_perplexity", "max_steps": 1})
    assert recipe.training_arguments().greater_is_better is False
    train(recipe)
    _without_model(monkeypatch)
    wrong = run_recipe(tmp_path, backbone, output_dir="elsewhere", trainer={"metric_for_best_model": "animal_loss"})
    with pytest.raises(InputError, match=r"got 'animal_loss'; did you mean 'animals_loss'\?"):
        train(wrong)


def test_several_gpus_need_a_process_each(tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a launcher transformers would make replicas in threads, on rows of their own."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    on_gpus = run_recipe(tmp_path, backbone, trainer={"use_cpu": False})
    with pytest.raises(InputError) as error:
        train(on_gpus)
    launch = f"torchrun --standalone --nproc_per_node 4 -m hycam train {tmp_path / 'recipe.yaml'}"
    assert str(error.value) == (
        f"one process sees 4 GPUs, wanted a process for each: {launch}; or one GPU: CUDA_VISIBLE_DEVICES=0"
    )
    assert not (tmp_path / "run").exists()


def test_resuming_needs_the_optimizers_state(tmp_path: Path, backbone: Path) -> None:
    with pytest.raises(InputError, match=r"^--resume: trainer.save_only_model is true"):
        train(run_recipe(tmp_path, backbone, trainer={"save_only_model": True}), resume=True)


def test_a_logger_that_is_not_installed(tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_model(monkeypatch)
    with pytest.raises(
        InputError, match=r"recipe.yaml: trainer.report_to: got 'wandbb', wanted one of those installed"
    ):
        train(run_recipe(tmp_path, backbone, trainer={"report_to": ["tensorboard", "wandbb"]}))


def test_a_tokenizer_needs_eos_and_pad(tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_model(monkeypatch)
    copy = tmp_path / "copy"
    shutil.copytree(backbone, copy)
    save_tokenizer(copy, pad_token="<pad>")
    with pytest.raises(InputError, match=r"tokenizer: .*copy: no eos token"):
        train(run_recipe(tmp_path, copy))
    save_tokenizer(copy, eos_token="<eos>")
    with pytest.raises(InputError, match=r"tokenizer: .*copy: no pad token, .*backbone\.pad_token: '<eos>' in a"):
        train(run_recipe(tmp_path, copy))
    recipe = run_recipe(tmp_path, copy, backbone={"pad_token": "<eos>"})
    assert load_tokenizer(recipe.backbone, str(copy)).pad_token == "<eos>"


def test_weights_come_from_safetensors_alone(tmp_path: Path, backbone: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(backbone, copy)
    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(state, copy / "pytorch_model.bin")
    recipe = run_recipe(tmp_path, copy)
    with pytest.raises(InputError, match=r"backbone.name_or_path: .*copy: can't be loaded: .*safetensors"):
        load_model(recipe.backbone, str(copy))
    (copy / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"backbone.name_or_path: .*copy: can't be loaded"):
        load_model(recipe.backbone, str(copy))


def test_code_of_the_backbones_repository_is_not_run(tmp_path: Path, backbone: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(backbone, copy)
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match=r"backbone.name_or_path: .*can't be loaded"):
        train(run_recipe(tmp_path, copy))
    assert not (tmp_path / "ran").exists()


def test_a_split_without_rows_is_an_error(tmp_path: Path, backbone: Path) -> None:
    few = [{"name": "few", "source": str(save_rows(tmp_path / "few.jsonl", rows(3)))}]
    with pytest.raises(InputError, match=r"^tasks: few: fold 0: no row of 3 falls to"):
        train(run_recipe(tmp_path, backbone, tasks=few))
