"""An attention layer, a whole training step and generation, by method: real shapes on CUDA, tiny ones on a CPU."""

import pytest
import torch

from benchmarks.conftest import DEVICE
from benchmarks.harness.memory import release
from benchmarks.harness.session import dtype_name
from benchmarks.harness.timing import sets_beyond_cache
from benchmarks.models.backbones import ModelShape
from benchmarks.models.generation import Generation, check_generation
from benchmarks.models.shapes import CPU_GENERATION, CPU_MODELS, GENERATION, LAYERS, MODELS, NEW_TOKENS
from benchmarks.models.training import AttentionLayer, Setting, TrainingStep, check_attention, check_step
from benchmarks.op.peers import work
from benchmarks.op.shapes import PASSES

ON_CUDA = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
OURS = ("hycam-torch", "hycam-fused") if ON_CUDA else ("hycam-torch",)
HYCAM = ("frozen", "hycam-eager", *OURS)
STEPS = (*HYCAM, "lora", "multilora", "moe-lora", "full")


@pytest.fixture(autouse=True)
def _freed():
    """The memory of one model is free before the next is built."""
    yield
    release(DEVICE)


def labels(group: str, shape: ModelShape, pass_: str, name: str, **more) -> dict:
    return {"group": group, "shape": shape, "dtype": dtype_name(DTYPE), "pass": pass_, "peer": name} | more


@pytest.mark.parametrize("name", HYCAM)
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("shape", LAYERS if ON_CUDA else CPU_MODELS, ids=str)
def test_attention_layer(shape, pass_, name, timed):
    check_attention(name, shape, DTYPE, DEVICE)
    layer = AttentionLayer(name, shape, DTYPE, DEVICE)
    first = layer.arguments()
    sets = [first, *(layer.arguments(seed) for seed in range(1, sets_beyond_cache(first, DEVICE)))]
    timed(work(layer.call, sets, pass_), labels("attention", shape, pass_, name))


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("setting", [Setting(), Setting(checkpointing=True)], ids=str)
@pytest.mark.parametrize("shape", MODELS[:1] if ON_CUDA else CPU_MODELS, ids=str)
def test_training_step(shape, setting, name, timed):
    check_step(name, shape, DTYPE, DEVICE, setting)
    step = TrainingStep(name, shape, DTYPE, DEVICE, setting)
    timed(step.work(), labels("step", shape, "step", name, setting=str(setting)))


@pytest.mark.parametrize("name", HYCAM)
@pytest.mark.parametrize("shape", GENERATION if ON_CUDA else CPU_GENERATION, ids=str)
def test_generation(shape, name, timed):
    check_generation(name, shape, DTYPE, DEVICE)
    generation = Generation(name, shape, DTYPE, DEVICE, NEW_TOKENS[DEVICE.type])
    timed(generation.work(), labels("generation", shape, "generate", name))
