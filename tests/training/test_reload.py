"""Adapters of every precision, opened again in one plain process: the very weights and logits that were trained."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from peft import PeftModel
from safetensors.torch import load_file

from hycam.errors import InputError, RunStoppedError
from hycam.training.adapters import check_adapter
from hycam.training.backbone import load_backbone_config
from hycam.training.measure import training_precision
from hycam.training.run import train
from hycam.training.trained import load_run
from hycam.training.trainer import HyCAMTrainer
from tests.adapter.builders import adapted_model, by_saved_name
from tests.models import tiny_model
from tests.training.gguf_files import save_gguf
from tests.training.runs import SignalAt, also_call, assert_same_run, run_recipe

_KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32 beside bfloat16": {"backbone": {"dtype": "bfloat16"}},
    "float32 beside float16": {"backbone": {"dtype": "float16"}},
    "bfloat16": {"backbone": {"dtype": "bfloat16"}, "method": {"autocast_adapter_dtype": False}},
    "float16": {"backbone": {"dtype": "float16"}, "method": {"autocast_adapter_dtype": False}},
    "autocast": {"trainer": {"bf16": True}},
    "compiled": {"trainer": {"torch_compile": True, "torch_compile_backend": "aot_eager"}},
    "GGUF": {},
    "GGUF in bfloat16": {"backbone": {"dtype": "bfloat16"}},
}
_QUICK = ("float16", "GGUF in bfloat16")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in _QUICK else pytest.mark.slow) for kind in _KINDS]
)
def test_a_run_s_adapter_is_what_was_trained(
    tmp_path: Path, backbone: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[HyCAMTrainer] = []
    save = HyCAMTrainer.save_model
    monkeypatch.setattr(
        HyCAMTrainer, "save_model", lambda self, *args, **kwargs: (trained.append(self), save(self, *args, **kwargs))
    )
    if kind.startswith("GGUF"):
        backbone, _ = save_gguf(tmp_path / "gguf", GGMLQuantizationType.Q8_0)
    fast = {"max_steps": 2, "eval_steps": 2, "save_steps": 2, "warmup_steps": 0, "learning_rate": 1e-3}
    sections = dict(_KINDS[kind])
    sections["trainer"] = fast | sections.get("trainer", {})
    recipe = run_recipe(tmp_path, backbone, **sections)
    train(recipe)
    model = trained[-1].adapted.eval()
    saved = load_file(recipe.output_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {_DTYPES.get(kind, torch.float32)}
    loaded, _ = load_run(recipe.output_path)
    for of_model in (model, loaded):
        tensors = by_saved_name((name, p) for name, p in of_model.named_parameters() if "hycam_" in name)
        assert tensors.keys() == saved.keys()
        assert all(torch.equal(tensors[name], saved[name]) for name in saved)
        assert {tensor.dtype for tensor in tensors.values()} == {_DTYPES.get(kind, torch.float32)}
    assert any(tensor.abs().max() > 0 for name, tensor in saved.items() if "shared" in name)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad(), training_precision(recipe, ids.device):
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        with loaded.disable_adapter():
            assert not torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_run_in_16_bits_goes_on_in_them(tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' own way of loading a checkpoint's adapter goes on in float32."""
    sections: dict[str, Any] = {"backbone": {"dtype": "bfloat16"}, "method": {"autocast_adapter_dtype": False}}
    sections["trainer"] = {"max_steps": 4, "eval_steps": 2, "save_steps": 2}
    train(run_recipe(tmp_path / "straight", backbone, **sections))
    recipe = run_recipe(tmp_path / "stopped", backbone, **sections)
    with monkeypatch.context() as patch:
        also_call(patch, SignalAt(signal.SIGTERM, 2))
        with pytest.raises(RunStoppedError):
            train(recipe)
    train(recipe, resume=True)
    assert_same_run(recipe.output_path, tmp_path / "straight" / "run")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peft_alone_loads_the_weights_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """In float32 by default; in the dtype that they have with `autocast_adapter_dtype=False`, then the logits too."""
    model = adapted_model(dtype=dtype, noise="never").eval()
    for parameter in model.parameters():
        parameter.data = parameter.to(dtype)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {dtype}
    for autocast in (True, False):
        loaded = PeftModel.from_pretrained(tiny_model(dtype=dtype), tmp_path, autocast_adapter_dtype=autocast).eval()
        tensors = by_saved_name((name, p) for name, p in loaded.named_parameters() if "hycam_" in name)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32 if autocast else dtype}
        assert all(torch.equal(tensors[name], saved[name].to(tensors[name].dtype)) for name in saved)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_an_adapter_in_shards_is_named(tmp_path: Path, backbone: Path) -> None:
    """As transformers' `save_pretrained` writes one above its `max_shard_size`; PEFT reads one file."""
    adapted_model(sizes={"vocab_size": 320}).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model-00001-of-00001.safetensors")
    (tmp_path / "adapter_model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {}}')
    settings = run_recipe(tmp_path / "run", backbone).backbone
    with pytest.raises(InputError, match=r"^--adapter: .*adapter_model\.safetensors\.index\.json: .*wanted one file"):
        check_adapter(tmp_path, settings, load_backbone_config(settings, str(backbone)), str(backbone))
