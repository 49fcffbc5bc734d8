"""Adapters saved by version 0.1.0, before `hycam.adapter` was a package, load unchanged."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import hycam  # noqa: F401 (makes the methods known to PEFT)
from tests.adapter.builders import batch
from tests.models import tiny_model

SAVED = Path(__file__).with_name("saved")


@pytest.mark.parametrize("method", ["hycam", "multilora", "moelora"])
def test_an_adapter_saved_before_is_loaded_and_saved_again_unchanged(method, tmp_path):
    base = tiny_model()
    want = base.eval()(**batch()).logits
    model = PeftModel.from_pretrained(base, str(SAVED / method)).eval()
    assert not torch.equal(model(**batch()).logits, want)
    model.save_pretrained(tmp_path)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (SAVED / method, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (SAVED / method, tmp_path)]
    for config in configs:
        del config["peft_version"], config["base_model_name_or_path"]
    assert {name: configs[1][name] for name in configs[0]} == configs[0]
    assert not any(configs[1][name] for name in configs[1].keys() - configs[0].keys()), "what is new since is off"
