"""Small runs for the tests: a tiny backbone with its tokenizer, rows in files, a recipe over both."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from hycam.training.callbacks import MetricsFile, read_metrics
from hycam.training.recipe import Recipe, load_recipe
from tests.models import tiny_model

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
_COLOURS = ("red", "green", "blue", "white")
_ANIMALS = ("cat", "dog", "owl", "fox", "hen", "cow", "bee", "ant")


def rows(count: int, *, offset: int = 0) -> list[dict[str, str]]:
    """Rows with prompts of their own and short responses."""
    return [
        {
            "instruction": f"Say the colour of {_ANIMALS[n % 8]} {n + offset}",
            "input": "" if n % 2 else f"it is {_COLOURS[n % 4]}",
            "output": f"{_ANIMALS[n % 8]} {n + offset} is {_COLOURS[n % 4]}",
        }
        for n in range(count)
    ]


def save_rows(path: Path, values: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in values) + "\n", encoding="utf-8")
    return path


def save_tokenizer(folder: Path, **special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens; `special` replaces its eos and pad token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = [text for row in rows(40) for text in row.values()]
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<pad>", "<eos>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    names = special or {"eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=_CHAT_TEMPLATE, **names)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_backbone(folder: Path, *, hidden_size: int = 32) -> Path:
    """A random Llama of two layers and 128 positions, with its tokenizer."""
    tokenizer = save_tokenizer(folder)
    model = tiny_model(
        vocab_size=320,
        hidden_size=hidden_size,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(folder)
    return folder


def recipe_values(folder: Path, backbone: Path, /, **sections: Any) -> dict[str, Any]:
    """A recipe of two tasks whose files this writes into `folder`: 12 steps an epoch, validated every 4."""
    values: dict[str, Any] = {
        "seed": 1,
        "output_dir": str(folder / "run"),
        "backbone": {"name_or_path": str(backbone)},
        "method": {"r": 4, "num_experts": 2},
        "tasks": [
            {"name": "colours", "source": str(save_rows(folder / "colours.jsonl", rows(40)))},
            {"name": "animals", "source": str(save_rows(folder / "animals.jsonl", rows(30, offset=100)))},
        ],
        "data": {"max_length": 64, "prompt": "chat"},
        "trainer": {
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "save_strategy": "steps",
            "save_steps": 4,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        },
    }
    for name, section in sections.items():
        values[name] = values[name] | section if isinstance(values.get(name), dict) else section
    return values


def save_recipe(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def logged_numbers(folder: Path) -> list[dict[str, Any]]:
    """Every logged number but those that a process counts from its own beginning."""
    own = ("tokens_per_second", "padding_share", "seconds", "peak_bytes")
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "train_runtime" not in line]
    return [{key: value for key, value in line.items() if key not in own} for line in lines]


def run_recipe(folder: Path, backbone: Path, /, **sections: Any) -> Recipe:
    """The recipe of `recipe_values`, as it is read from its file."""
    folder.mkdir(exist_ok=True)
    return load_recipe(str(save_recipe(folder, recipe_values(folder, backbone, **sections))))


def assert_same_run(resumed: Path, straight: Path) -> None:
    """The same numbers logged, adapter and test metrics, bit for bit."""
    assert logged_numbers(resumed) == logged_numbers(straight)
    got, wanted = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (resumed, straight))
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    results = [json.loads((folder / "results.json").read_text()) for folder in (resumed, straight)]
    for key in ("test", "steps", "best_step"):
        assert results[0][key] == results[1][key]


class SignalAt(TrainerCallback):
    """Sends a signal to this process in the middle of a step, `times` in a row."""

    def __init__(self, number: signal.Signals, step: int, *, times: int = 1) -> None:
        self.number, self.step, self.times = number, step, times

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            for _ in range(self.times):
                signal.raise_signal(self.number)


def also_call(patch: pytest.MonkeyPatch, callback: TrainerCallback) -> None:
    """Run `callback` beside the run's own ones."""
    patch.setattr(
        MetricsFile,
        "on_pre_optimizer_step",
        lambda self, *args, **kwargs: callback.on_pre_optimizer_step(*args, **kwargs),
        raising=False,
    )
