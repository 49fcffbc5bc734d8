"""Adapters saved by version 0.1.0, before `hycam.adapter` was a package, load unchanged; later formats are refused."""

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import hycam
from hycam.adapter.parameters import AdapterLayer
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
    assert configs[1].pop("format_version") == 1, "which a file without it has"
    for config in configs:
        del config["peft_version"], config["base_model_name_or_path"]
    assert {name: configs[1][name] for name in configs[0]} == configs[0]
    assert not any(configs[1][name] for name in configs[1].keys() - configs[0].keys()), "what is new since is off"


@pytest.mark.parametrize("method", ["hycam", "multilora", "moelora"])
def test_a_models_state_dict_of_before_is_loaded(method):
    """Its live parameters were named as the adapter is, with nothing after."""
    want = PeftModel.from_pretrained(tiny_model(), str(SAVED / method)).eval()
    new = PeftModel.from_pretrained(tiny_model(), str(SAVED / method)).eval()
    stacked = {name for layer in want.modules() if isinstance(layer, AdapterLayer) for name in layer.stacked_names}
    state = {
        name.removesuffix(".weight") if name.removesuffix(".default.weight").split(".")[-1] in stacked else name: tensor
        for name, tensor in want.state_dict().items()
    }
    assert any(name.endswith(".default") for name in state)
    for parameter in new.parameters():
        parameter.data.zero_()
    assert new.load_state_dict(state) == torch.nn.modules.module._IncompatibleKeys([], [])
    assert torch.equal(new(**batch()).logits, want(**batch()).logits)


@pytest.mark.parametrize("method", ["hycam", "multilora", "moelora"])
def test_an_adapter_is_copied_by_its_parameters_names(method):
    """As TRL's trainers make their reference from a trained adapter."""
    model = PeftModel.from_pretrained(tiny_model(), str(SAVED / method)).eval()
    want = model(**batch()).logits
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(model(**batch()).logits, want)


@pytest.mark.parametrize("method", ["hycam", "multilora", "moelora"])
def test_a_later_format_is_refused_by_name(method, tmp_path):
    """Whatever else is new in it."""
    folder = shutil.copytree(SAVED / method, tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 2, "r": "sixty-four", "shape": "new"}))
    installed = importlib.metadata.version("hycam-kernels")
    with pytest.raises(ValueError, match=r"^adapter_config\.json: format_version: got 2, which a later") as error:
        PeftModel.from_pretrained(tiny_model(), str(folder))
    assert str(error.value).endswith(f"hycam-kernels {installed} reads up to 1: pip install --upgrade hycam-kernels")


@pytest.mark.parametrize("version", [0, "1", True, None])
def test_a_format_that_is_no_number_is_refused(version):
    with pytest.raises(ValueError, match=r"format_version: got .*, want an integer of at least 1"):
        hycam.HyCAMConfig(format_version=version)
