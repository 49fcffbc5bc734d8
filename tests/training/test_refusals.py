"""What a run refuses, before any work is lost."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file
from transformers import AutoTokenizer, T5Config, ViTConfig

from hycam.errors import InputError
from hycam.training.backbone import load_model, load_tokenizer
from hycam.training.method import MethodConfig
from hycam.training.rehearsal import rehearse
from hycam.training.run import train
from hycam_cli import main
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
        (
            {"backbone": {"name_or_path": "./no-such-backbone"}},
            "backbone.name_or_path: ./no-such-backbone: no such folder",
        ),
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
        ({"trainer": {"max_steps": -5}}, "trainer.max_steps: got -5, wanted at least 0"),
        ({"trainer": {"weight_decay": -1.0}}, "trainer.weight_decay: got -1.0, wanted at least 0"),
        ({"trainer": {"label_smoothing_factor": 2.0}}, "trainer.label_smoothing_factor: got 2.0, wanted below 1"),
        ({"trainer": {"max_grad_norm": math.nan}}, "trainer.max_grad_norm: got nan, wanted a finite number"),
        ({"trainer": {"learning_rate": math.inf}}, "trainer.learning_rate: got inf, wanted a finite number"),
        ({"early_stopping": {"threshold": math.nan}}, "early_stopping.threshold: got nan, wanted a finite number"),
        ({"trainer": {"adam_beta1": 1.5}}, "trainer.adam_beta1: got 1.5: Invalid beta"),
        ({"trainer": {"adam_beta2": 1.0}}, "trainer.adam_beta2: got 1.0: Invalid beta"),
        ({"trainer": {"adam_epsilon": -1.0}}, "trainer.adam_epsilon: got -1.0, wanted at least 0"),
        ({"trainer": {"dataloader_num_workers": -1}}, "trainer.dataloader_num_workers: got -1, wanted at least 0"),
        ({"trainer": {"dataloader_persistent_workers": True}}, "trainer.dataloader_persistent_workers: got True: "),
        (
            {"trainer": {"lr_scheduler_type": "cosine_with_min_lr"}},
            "trainer.lr_scheduler_type: got 'cosine_with_min_lr'",
        ),
        ({"trainer": {"lr_scheduler_kwargs": {"nothing": 1}}}, "trainer.lr_scheduler_kwargs: got {'nothing': 1}"),
        ({"trainer": {"optim": "galore_adamw"}}, "trainer.optim: got 'galore_adamw'"),
        (
            {"trainer": {"torch_compile": True, "torch_compile_backend": "nothing"}},
            "trainer.torch_compile_backend: got",
        ),
        ({"trainer": {"accelerator_config": {"nothing": 1}}}, "trainer: "),
        (
            {"trainer": {"per_device_train_batch_size": 100, "dataloader_drop_last": True}},
            "trainer.dataloader_drop_last: got True: dataloader_drop_last leaves none of 47 rows",
        ),
        ({"tasks": [{"name": "overall", "source": "synthetic_code"}]}, "tasks: got the name 'overall', wanted another"),
        ({"method": {"r": 100_000_000}}, "method: "),
        ({"method": {"r": 10**12}}, "method: "),
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


def test_yamls_no_is_the_word(tmp_path: Path, backbone: Path) -> None:
    """`eval_strategy: no` is false in YAML 1.1."""
    trainer = {"eval_strategy": False, "save_strategy": False, "load_best_model_at_end": False, "max_steps": 1}
    recipe = run_recipe(tmp_path, backbone, trainer=trainer)
    assert (recipe.trainer["eval_strategy"], recipe.trainer["save_strategy"]) == ("no", "no")
    assert train(recipe, test=False)["steps"] == 1


def test_a_hub_that_takes_no_repository_is_found_before_the_model_is_loaded(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is asked for is the run's own, not one that is named after a temporary folder."""
    asked: list[str] = []

    def create_repo(self: HfApi, repo_id: str, **options: Any) -> None:
        asked.append(repo_id)
        raise OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled.")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    _without_model(monkeypatch)
    with pytest.raises(InputError, match=r"trainer\.push_to_hub: got True: Cannot reach the hub: offline mode"):
        train(run_recipe(tmp_path, backbone, trainer={"push_to_hub": True}))
    assert set(asked) == {"run"}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"neftune_noise_alpha": 5.0},
        {"train_sampling_strategy": "group_by_length"},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"optim": "adafactor"},
        {"bf16": True},
    ],
)
def test_what_training_takes_is_not_refused(tmp_path: Path, backbone: Path, settings: dict[str, Any]) -> None:
    recipe = run_recipe(tmp_path, backbone, trainer=settings)
    rehearse(recipe, recipe.training_arguments(), Dataset.from_list([{"input_ids": [1], "labels": [1]}] * 20))


@pytest.mark.parametrize(
    ("config", "kind"), [(T5Config(), "t5"), (ViTConfig(), "vit")], ids=["encoder-decoder", "images"]
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_backbone_of_another_kind(
    tmp_path: Path, backbone: Path, config: Any, kind: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(backbone, copy)
    config.save_pretrained(copy)
    run_recipe(tmp_path, copy)
    assert main([command, str(tmp_path / "recipe.yaml")]) == 2
    assert f"copy: a model of type {kind}, wanted a causal language model" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", "", "[]", "no json"])
def test_a_damaged_tokenizer(tmp_path: Path, backbone: Path, content: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(backbone, copy)
    (copy / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"copy: can't be loaded: |tokenizer: "):
        train(run_recipe(tmp_path, copy))


def test_a_chat_template_that_fails_in_its_own_way(tmp_path: Path, backbone: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(backbone, copy)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.chat_template = "{{ messages[0]['content'] + 1 }}"
    tokenizer.save_pretrained(copy)
    with pytest.raises(InputError, match="tokenizer: chat template: "):
        train(run_recipe(tmp_path, copy))


@pytest.mark.parametrize("line", ["{", "[]", '{"loss": 1.0}', '{"step": 3, "eval_loss": "x"}', "null", "\x00"])
def test_a_damaged_log_is_named_before_going_on(tmp_path: Path, backbone: Path, line: str) -> None:
    recipe = run_recipe(tmp_path, backbone, trainer={"max_steps": 4})
    train(recipe, test=False)
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl:\d+: damaged"):
        train(recipe, resume=True)


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
