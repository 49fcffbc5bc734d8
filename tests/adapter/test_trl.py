"""TRL's trainers: what the balance loss weighs under them, and where training of a new or a trained adapter starts."""

import math

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import LlamaForSequenceClassification

from tests.adapter.balance_probe import TOLERANCE, Probe, new_adapter
from tests.adapter.builders import config, randomise
from tests.models import tiny_config, tiny_model
from tests.training.runs import save_tokenizer

pytest.importorskip("trl")

from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

pytestmark = pytest.mark.filterwarnings("error:the model returns no loss", "error:the backward pass doesn't come")

WORDS = ["the", "fox", "saw", "a", "red", "owl", "near", "one", "green", "hen", "and", "the", "cow"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def backbone(tokenizer, family="llama", **settings):
    vocabulary = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_model(family, **vocabulary, **settings)
    model.generation_config.eos_token_id = list(range(1, 60))  # completions of uneven lengths
    return model


def text(start, length):
    return " ".join(WORDS[(start + n) % len(WORDS)] for n in range(length))


def prompts_with_completions(count=8):
    return Dataset.from_list(
        [{"prompt": text(n, 2), "completion": " " + text(n, 1 + 2 * (n % 4))} for n in range(count)]
    )


def pairs(count=8):
    return Dataset.from_list(
        [
            {"prompt": text(n, 2), "chosen": " " + text(n + 2, 1 + n % 3), "rejected": " " + text(n, 4 - n % 3)}
            for n in range(count)
        ]
    )


def judged(count=8):
    return Dataset.from_list(
        [{"prompt": text(n, 2), "completion": " " + text(n, 1 + n % 4), "label": n % 2 == 0} for n in range(count)]
    )


def prompts(count=4):
    return Dataset.from_list([{"prompt": text(n, 2 + n)} for n in range(count)])


def by_length(completions, **kwargs):
    return [float(len(completion) % 7) for completion in completions]


ONLINE = {"reward_funcs": by_length}
ONLINE_SETTINGS = {"num_generations": 2, "max_completion_length": 6}


def run(trainer_class, config_class, model, data, tokenizer, folder, *, options=None, callbacks=(), **settings):
    """Train for one step, unless `settings` say otherwise; returns the trainer."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 1,
        "learning_rate": 0.0,
        "max_grad_norm": 0,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    } | settings
    trainer = trainer_class(
        model=model,
        args=config_class(**settings),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        **(options or {}),
    )
    trainer.train()
    return trainer


def parts(probe):
    """Each micro-batch's part of the targets."""
    counts = [int((inputs["labels"][:, 1:] != -100).sum()) for inputs in probe.micro_batches]
    return [count / sum(counts) for count in counts]


def mean_over_step(outputs, labels, num_items_in_batch):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


SFT = {
    "nll": {},
    "dft": {"loss_type": "dft"},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "compute_loss_func": {"options": {"compute_loss_func": mean_over_step}},
    "packing": {"packing": True, "max_length": 32},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.mark.parametrize("path", SFT)
@pytest.mark.parametrize("steps", [pytest.param(n, marks=pytest.mark.slow) if n != 4 else n for n in (1, 2, 4, 8)])
def test_sft(tokenizer, tmp_path, path, steps):
    model, data = new_adapter(backbone(tokenizer)), prompts_with_completions()
    probe, settings = Probe(model), {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
    run(SFTTrainer, SFTConfig, model, data, tokenizer, tmp_path, callbacks=[probe], **settings, **SFT[path])
    assert probe.error(parts(probe)) < TOLERANCE


PREFERENCES = {
    "dpo": (DPOTrainer, DPOConfig, pairs),
    "kto": (KTOTrainer, KTOConfig, judged),
    "rloo": (RLOOTrainer, RLOOConfig, prompts),
    "reward": (RewardTrainer, RewardConfig, pairs),
}


@pytest.mark.parametrize("method", PREFERENCES)
@pytest.mark.parametrize("steps", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_equal_parts(tokenizer, tmp_path, method, steps):
    trainer_class, config_class, data = PREFERENCES[method]
    base = backbone(tokenizer)
    if method == "reward":
        base = LlamaForSequenceClassification(tiny_config(vocab_size=320, num_labels=1))
    model = new_adapter(base, task_type=None)
    probe, options = Probe(model), None
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": steps}
    if method == "rloo":
        options, settings = ONLINE, settings | ONLINE_SETTINGS
    run(
        trainer_class, config_class, model, data(), tokenizer, tmp_path, options=options, callbacks=[probe], **settings
    )  # fmt: skip
    assert probe.error([1 / steps] * steps) < TOLERANCE


OVER_TOKENS = ("dapo", "cispo", "vespo")


@pytest.mark.parametrize(
    "loss_type",
    [
        "dapo",
        "grpo",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("cispo", "vespo", "bnpo", "dr_grpo", "sapo", "luspo")
        ),
    ],
)
def test_grpo(tokenizer, tmp_path, loss_type):
    model = new_adapter(backbone(tokenizer))
    probe = Probe(model)
    settings = ONLINE_SETTINGS | {
        "loss_type": loss_type,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
    }
    run(GRPOTrainer, GRPOConfig, model, prompts(), tokenizer, tmp_path, options=ONLINE, callbacks=[probe], **settings)
    by_tokens = parts(probe)
    assert len(set(by_tokens)) > 1
    assert probe.error(by_tokens if loss_type in OVER_TOKENS else [0.25] * 4) < TOLERANCE


@pytest.mark.slow
def test_grpo_generates_for_several_steps(tokenizer, tmp_path):
    """A step's tokens are then taken to be its part of all that were generated, as the trainer divides by them."""
    model = new_adapter(backbone(tokenizer))
    probe = Probe(model)
    settings = ONLINE_SETTINGS | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    settings |= {"steps_per_generation": 8, "loss_type": "dapo"}
    trainer = run(
        GRPOTrainer, GRPOConfig, model, prompts(8), tokenizer, tmp_path, options=ONLINE, callbacks=[probe], **settings
    )  # fmt: skip
    generated = sum(int(batch["completion_mask"].sum()) for batch in trainer._buffered_inputs)
    counts = [int((inputs["labels"][:, 1:] != -100).sum()) for inputs in probe.micro_batches]
    assert probe.error([count / (generated * 2 / 8) for count in counts]) < TOLERANCE


def first_log(trainer):
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


def start_model(tokenizer, adapter):
    """The model and peft_config that a trainer is given for a new adapter, and for one that is trained already."""
    settings = {"noise": "train", "balance_coef": 0.1}
    if adapter == "new":
        return backbone(tokenizer, "qwen3"), config(**settings)
    model = new_adapter(backbone(tokenizer, "qwen3"), **settings)
    randomise(model)
    return model, None


@pytest.mark.parametrize("ahead", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("adapter", ["new", "trained"])
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_preferences_start_at_the_reference(tokenizer, tmp_path, method, adapter, ahead):
    trainer_class, config_class, data = PREFERENCES[method]
    model, peft_config = start_model(tokenizer, adapter)
    trainer = run(
        trainer_class, config_class, model, data(), tokenizer, tmp_path, options={"peft_config": peft_config},
        per_device_train_batch_size=4, precompute_ref_log_probs=ahead,
    )  # fmt: skip
    log = first_log(trainer)
    if method == "dpo":
        assert float(log["loss"]) == pytest.approx(math.log(2), abs=1e-5)
        assert float(log["rewards/margins"]) == pytest.approx(0, abs=1e-5)
    else:
        assert float(log["loss"]) == pytest.approx(0.5, abs=1e-5)
        assert float(log["kl"]) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("adapter", ["new", "trained"])
@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_reinforcement_starts_at_ratio_1(tokenizer, tmp_path, method, adapter):
    trainer_class, config_class = (GRPOTrainer, GRPOConfig) if method == "grpo" else (RLOOTrainer, RLOOConfig)
    model, peft_config = start_model(tokenizer, adapter)
    trainer = run(
        trainer_class, config_class, model, prompts(), tokenizer, tmp_path,
        options=ONLINE | {"peft_config": peft_config},
        per_device_train_batch_size=4, steps_per_generation=2, beta=0.1, epsilon=1e-4, **ONLINE_SETTINGS,
    )  # fmt: skip
    log = first_log(trainer)
    assert float(log["kl"]) == pytest.approx(0, abs=1e-5)
    assert float(log["reward_std"]) > 0
    assert float(log["clip_ratio/region_mean"]) == 0


@pytest.mark.slow
def test_a_compiled_model_starts_at_the_reference(tokenizer, tmp_path):
    torch._dynamo.reset()
    model, _ = start_model(tokenizer, "trained")
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager", "per_device_train_batch_size": 4}
    trainer = run(DPOTrainer, DPOConfig, model, pairs(), tokenizer, tmp_path, **settings)
    assert float(first_log(trainer)["loss"]) == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.slow
def test_a_compiled_models_balance_loss(tokenizer, tmp_path):
    torch._dynamo.reset()
    model = new_adapter(backbone(tokenizer))
    probe = Probe(model)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    settings |= {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    data = prompts_with_completions()
    run(SFTTrainer, SFTConfig, model, data, tokenizer, tmp_path, callbacks=[probe], **settings)
    assert probe.error(parts(probe)) < TOLERANCE


def test_noise_always_is_told(tokenizer, tmp_path):
    model = new_adapter(backbone(tokenizer), noise="always")
    with pytest.warns(UserWarning, match="DPOTrainer compares passes of the model.*set noise='never'"):
        run(DPOTrainer, DPOConfig, model, pairs(), tokenizer, tmp_path, per_device_train_batch_size=4)


def test_noise_goes_on_where_nothing_is_compared(tokenizer, tmp_path):
    """SFT draws it, from the generator of torch."""
    model = new_adapter(backbone(tokenizer), noise="train")
    randomise(model)
    losses = set()
    for seed in (1, 2):
        settings = {"per_device_train_batch_size": 8, "seed": seed, "data_seed": 0}
        trainer = run(SFTTrainer, SFTConfig, model, prompts_with_completions(), tokenizer, tmp_path, **settings)
        losses.add(first_log(trainer)["loss"])
    assert len(losses) == 2
