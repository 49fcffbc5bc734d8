"""What trainers and PEFT's own functions read off the settings, or ask of an adapter."""

import json
import re

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from trl import SFTConfig, SFTTrainer

from hycam import HyCAMConfig, hotswap_adapter
from hycam.methods import MoeLoraConfig, MultiLoraConfig
from tests.adapter.builders import adapted_model, batch, config, layers_of, randomise
from tests.data.tokenizers import CHAT_WITH_GENERATION, byte_tokenizer
from tests.models import tiny_model

TOKENS = [5, 9, 77]


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch()).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("given", [TOKENS, {"embed_tokens": TOKENS}])
def test_trained_tokens(given, tied, tmp_path):
    base = tiny_model(tie_word_embeddings=tied)
    before = base.get_input_embeddings().weight.detach().clone()
    model = get_peft_model(base, config(trainable_token_indices=given)).train()
    inputs = batch()
    inputs["input_ids"][2, :3] = torch.tensor(TOKENS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**inputs).loss.backward()
    optimizer.step()
    randomise(model)

    after = model.get_input_embeddings().token_adapter.get_merged_weights(["default"])
    changed = (after != before).any(-1).nonzero().flatten().tolist()
    assert changed == TOKENS
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(tie_word_embeddings=tied), tmp_path)
    assert torch.equal(logits(again), logits(model))
    other = get_peft_model(tiny_model(tie_word_embeddings=tied), config(trainable_token_indices=given))
    hotswap_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model(tie_word_embeddings=tied)))
    assert torch.equal(logits(model.unload()), logits(tiny_model(tie_word_embeddings=tied)))


def test_a_chat_template_that_adds_tokens(tmp_path):
    """TRL clones template and tokens, and sets on the settings what trains their embeddings."""
    template = byte_tokenizer(chat_template=CHAT_WITH_GENERATION)
    template.add_tokens(["<|one|>", "<|two|>"], special_tokens=True)
    template.save_pretrained(tmp_path / "template")
    tokenizer = byte_tokenizer()
    rows = [[{"role": "user", "content": "Name <|one|>"}, {"role": "assistant", "content": "Red <|two|>"}]] * 4
    trainer = SFTTrainer(
        model=tiny_model(vocab_size=len(tokenizer)),
        args=SFTConfig(
            output_dir=str(tmp_path / "run"),
            chat_template_path=str(tmp_path / "template"),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=0.1,
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=Dataset.from_dict({"messages": rows}),
        processing_class=tokenizer,
        peft_config=config(),
    )
    added = trainer.model.peft_config["default"].trainable_token_indices["embed_tokens"]
    assert trainer.processing_class.convert_ids_to_tokens(added)[:2] == ["<|one|>", "<|two|>"]
    trainer.train()
    delta = trainer.model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
    start = trainer.model.get_input_embeddings().original_module.weight[added]
    assert ((delta - start) != 0).any(-1)[:2].all()
    trainer.save_model(str(tmp_path / "adapter"))
    assert HyCAMConfig.from_pretrained(tmp_path / "adapter").trainable_token_indices == {"embed_tokens": added}


@pytest.mark.parametrize("config_class", [HyCAMConfig, MoeLoraConfig, MultiLoraConfig])
def test_a_trainer_sets_what_the_chat_template_needs(config_class):
    """As TRL does where a template adds tokens: on the settings, after they were made."""
    settings = config_class(r=2, task_type="CAUSAL_LM")
    assert settings.trainable_token_indices is None
    assert settings.modules_to_save is None
    settings.trainable_token_indices, settings.modules_to_save = {"embed_tokens": TOKENS}, ["lm_head"]
    model = get_peft_model(tiny_model(), settings).train()
    model(**batch()).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("trainable_tokens_delta" in name for name in trained)
    assert any("lm_head.modules_to_save.default" in name for name in trained)


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"exclude_modules": ["layers.0.self_attn"]}, [1]),
        ({"exclude_modules": r".*\.1\.self_attn", "target_modules": ["self_attn"]}, [0]),
        ({"exclude_modules": ["lm_head"]}, [0, 1]),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, [1]),
        ({"layers_to_transform": 0, "layers_pattern": ["blocks", "layers"]}, [0]),
    ],
)
def test_targets(settings, layers, tmp_path):
    model = get_peft_model(tiny_model(), config(**settings))
    want = [f"base_model.model.model.layers.{index}.self_attn" for index in layers]
    assert list(layers_of(model)) == want
    model.save_pretrained(tmp_path)
    assert list(layers_of(PeftModel.from_pretrained(tiny_model(), tmp_path))) == want
    randomise(model)
    model.train()(**batch()).loss.backward()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters: got ['experts.down_proj'], want none: it"),
        ({"rank_pattern": {"layers.0": 8}}, "rank_pattern: got {'layers.0': 8}, want none: every layer has rank r"),
        ({"alpha_pattern": {"layers.0": 8}}, "alpha_pattern: got {'layers.0': 8}, want none"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying: got True, want none: trained copies"),
        ({"exclude_modules": []}, "exclude_modules: got [], want a module name or a non-empty list"),
        ({"layers_pattern": 3, "layers_to_transform": 1}, "layers_pattern: got 3, want a module name"),
        ({"layers_pattern": "layers"}, "layers_pattern: got 'layers' without layers_to_transform, want both"),
        ({"trainable_token_indices": 3}, "trainable_token_indices: got 3, want a list of token ids"),
        ({"trainable_token_indices": {"embed_tokens": [-1]}}, "trainable_token_indices: got {'embed_tokens': [-1]}"),
    ],
)
def test_settings_that_are_refused(settings, message):
    """When they are made, and where a tool has set them since, before a module is replaced."""
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**settings)
    late, base = config(), tiny_model()
    for name, value in settings.items():
        setattr(late, name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(base, late)
    assert not layers_of(base)


def test_everything_excluded():
    with pytest.raises(ValueError, match=r"and exclude_modules=\['self_attn'\], which matches no module"):
        get_peft_model(tiny_model(), config(exclude_modules=["self_attn"]))


@pytest.mark.parametrize("settings", [config(), MoeLoraConfig(r=2), MultiLoraConfig(r=2)], ids=lambda c: c.peft_type)
def test_status(settings, tmp_path):
    model = get_peft_model(tiny_model(), settings)
    status = model.get_model_status()
    assert status.peft_types == {"default": settings.peft_type.value}
    assert status.enabled
    assert status.active_adapters == status.available_adapters == ["default"]
    assert status.merged_adapters == []
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == settings.peft_type.value
    assert f"KeyError: '{settings.peft_type.value}'" in (tmp_path / "README.md").read_text()


def two_adapters(**settings):
    model = adapted_model(**settings)
    model.add_adapter("other", config(**settings))
    randomise(model, seed=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shared": "slora", "bias": True, "train_norms": True, "trainable_token_indices": TOKENS},
        {"experts": "full", "layers_to_transform": [1], "modules_to_save": ["lm_head"]},
    ],
)
def test_weighted_sum_of_adapters(settings, tmp_path):
    model = two_adapters(**settings)
    before = logits(model)
    model.add_weighted_adapter(["default", "other"], [0.25, 0.75], "mean")
    assert torch.equal(logits(model), before)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if ".mean" in name)
    found = dict(model.named_parameters())
    names = [name for name in found if ".mean" in name]
    assert len(names) == sum(".other" in name for name in found)
    for name in names:
        want = 0.25 * found[name.replace(".mean", ".default")] + 0.75 * found[name.replace(".mean", ".other")]
        torch.testing.assert_close(found[name], want)
    model.add_weighted_adapter(["other"], [1.0], "alone")
    model.set_adapter("alone")
    copied = logits(model)
    model.set_adapter("other")
    assert torch.equal(logits(model), copied)
    model.set_adapter("mean")
    mean = logits(model)
    assert not torch.equal(mean, copied)
    model.save_pretrained(tmp_path, selected_adapters=["mean"])
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "mean")), mean)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (["default", "third"], [1, 1], "new"),
            "adapters: got ['default', 'third'], want a list of default, other, smaller",
        ),
        (([], [], "new"), "adapters: got [], want a list"),
        ((["default", "other"], [1.0], "new"), "weights: got [1.0], want a finite number for each of default, other"),
        ((["default"], [float("nan")], "new"), "weights: got [nan], want a finite number"),
        ((["default"], [1.0], "other"), "adapter_name: got 'other', which is there already, want a new name"),
        ((["default", "smaller"], [1, 1], "new"), "adapters: got default and smaller, which differ in r (4, 2)"),
        ((["default"], [1.0], "new", "svd"), "combination_type: got 'svd', want 'linear'"),
    ],
)
def test_sums_that_are_refused(arguments, message):
    model = two_adapters()
    model.add_adapter("smaller", config(r=2))
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=re.escape(message)):
        model.add_weighted_adapter(*arguments)
    assert set(model.state_dict()) == before
    assert list(model.peft_config) == ["default", "other", "smaller"]
