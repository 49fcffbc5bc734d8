"""Weights that are elsewhere when a forward begins: offloaded by accelerate, sharded by FSDP2 and DeepSpeed."""

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForCausalLM

from hycam import hotswap_adapter
from tests.adapter.builders import adapted_model, batch, config, layers_of
from tests.distributed.ranks import REPOSITORY, TORCHRUN, launch
from tests.versions import transformers_takes_this_peft

WORKER = Path(__file__).with_name("sharded_worker.py")


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloading_an_adapted_model(place, tmp_path):
    model = adapted_model(bias=True, shared="slora").eval()
    want = model(**batch()).logits
    if place == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert torch.equal(model(**batch()).logits, want)


@transformers_takes_this_peft
def test_adapting_an_offloaded_model(tmp_path):
    trained = adapted_model().eval()
    trained.save_pretrained(tmp_path / "adapter")
    trained.unload().save_pretrained(tmp_path / "base")
    layer = {"model.layers.1": "disk"}
    device_map = dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=device_map | layer, offload_folder=tmp_path / "offload"
    )
    assert model.model.layers[1].self_attn.q_proj.weight.device.type == "meta"
    model.add_adapter(config())
    hotswap_adapter(model, tmp_path / "adapter")
    assert {p.device.type for layer in layers_of(model).values() for p in layer.adapter_parameters()} == {"cpu"}
    want = adapted_model().eval()(**batch()).logits
    assert torch.equal(model.eval()(**batch()).logits, want)


def run_sharded(*arguments):
    run = launch([*TORCHRUN, "--nproc_per_node=2", str(WORKER), *arguments], REPOSITORY)
    assert run.returncode == 0, run.stderr[-3000:]
    errors = [float(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("error ")]
    assert len(errors) == 1
    return errors[0]


def test_fsdp2_has_the_gradients_of_one_process():
    assert run_sharded("fsdp2", "none") < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["non-reentrant", "reentrant"])
def test_fsdp2_with_checkpointing(checkpointing):
    assert run_sharded("fsdp2", checkpointing) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("norms", [(), ("train_norms",)])
@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_sharded_with_fused_norms(kind, norms):
    if kind == "zero3":
        pytest.importorskip("deepspeed")
    assert run_sharded(kind, "non-reentrant", "fuse_norm", *norms) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_zero_has_the_weights_of_one_process(stage, checkpointing):
    pytest.importorskip("deepspeed")
    assert run_sharded(stage, checkpointing) < 1e-5
