"""The longest row that fits: counted bytes are those of a real step, and grow in straight lines."""

from dataclasses import replace

import pytest
import torch

from benchmarks.models import longest
from benchmarks.models.backbones import ModelShape
from benchmarks.models.longest import counted_bytes, counted_longest, extrapolate, largest, measured_longest
from benchmarks.models.methods import METHODS
from benchmarks.models.training import Setting, adapted, loss_of, token_ids
from hycam.live_bytes import LiveBytes

SHAPE = ModelShape("tiny-llama", 1, 64, num_experts=2, rank=4)
CPU = torch.device("cpu")
ON_CPU = tuple(name for name in METHODS if name != "hycam-fused")


def measured_bytes(name: str, shape: ModelShape, dtype: torch.dtype, setting: Setting) -> int:
    """The same bytes of a real step on real tensors."""
    model = adapted(name, shape, dtype, CPU, setting)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    ids = token_ids(shape, CPU)
    held = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in trained), ids]
    with LiveBytes(held) as count:
        loss_of(model, ids).backward()
    return sum(tensor.nbytes for tensor in held) + 2 * sum(p.nbytes for p in trained) + count.peak


@pytest.mark.parametrize("name", ON_CPU)
def test_counted_bytes_are_those_of_a_real_step(name):
    """Exactly without checkpointing; with it fake tensors hold an activation and the positions longer."""
    assert counted_bytes(name, SHAPE, torch.float32) == pytest.approx(
        measured_bytes(name, SHAPE, torch.float32, Setting()), rel=1e-3
    )
    setting = Setting(checkpointing=True)
    activation = SHAPE.tokens * 256 * 4
    difference = counted_bytes(name, SHAPE, torch.float32, setting) - measured_bytes(
        name, SHAPE, torch.float32, setting
    )
    assert 0 <= difference <= 1.5 * activation


@pytest.mark.parametrize("name", ["hycam-torch", "lora"])
def test_four_counts_give_any_other(name, monkeypatch):
    monkeypatch.setattr(longest, "_LENGTHS", (64, 128))

    def count(length: int, layers: int) -> int:
        return counted_bytes(name, replace(SHAPE, length=length, layers=layers), torch.float32)

    value = extrapolate(count)
    assert value(200, 7) == pytest.approx(count(200, 7), rel=0.01)


def test_the_longest_row_just_fits(monkeypatch):
    monkeypatch.setattr(longest, "_LENGTHS", (64, 128))
    monkeypatch.setattr(longest, "_GRAIN", 8)
    shape = replace(SHAPE, layers=None)
    capacity = counted_bytes("hycam-torch", replace(shape, length=321), torch.float32)
    found = counted_longest("hycam-torch", shape, torch.float32, capacity=capacity)
    assert 304 <= found <= 328
    assert counted_longest("hycam-torch", shape, torch.float32, capacity=1000) == 0


@pytest.mark.parametrize("limit", [0, 1, 7, 8, 63, 64, 65, 1000])
def test_the_largest_that_fits_is_found_by_halves(limit):
    tried = []
    found = largest(lambda length: tried.append(length) or length <= limit, grain=8)
    assert found == limit // 8 * 8
    assert all(length % 8 == 0 for length in tried)
    assert len(tried) <= 2 * max(limit, 8).bit_length()


class Device:
    """Stands for a CUDA device's allocator: a step of more tokens than fit raises as torch does."""

    def __init__(self, monkeypatch, tokens: int) -> None:
        self.fractions: list[float] = []
        self.tokens = tokens
        self.freed = 0
        device = self

        class Step:
            def __init__(self, name, shape, *args) -> None:
                if device.tokens < shape.tokens:
                    raise torch.OutOfMemoryError("out of memory")
                self.batches = [torch.zeros(shape.batch, shape.length)] * 2
                self.model = torch.nn.Linear(1, 1)

            def run(self, index: int) -> None:
                if self.batches[index].numel() > device.tokens:
                    raise torch.OutOfMemoryError("out of memory")

        properties = type("Properties", (), {"total_memory": 160 * 10**9})
        monkeypatch.setattr(longest, "TrainingStep", Step)
        monkeypatch.setattr(longest, "token_ids", lambda shape, where: torch.zeros(shape.batch, shape.length))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda where: properties)
        monkeypatch.setattr(
            torch.cuda, "set_per_process_memory_fraction", lambda share, where: self.fractions.append(share)
        )
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(self, "freed", self.freed + 1))


@pytest.mark.parametrize(("tokens", "want"), [(5000, 4864), (256, 256), (100, 0)])
def test_measured_on_a_device_that_is_held_to_the_capacity(tokens, want, monkeypatch):
    device = Device(monkeypatch, tokens)
    assert measured_longest("lora", SHAPE, torch.bfloat16, torch.device("cuda", 0)) == want
    assert device.fractions == [0.5, 1.0]
    assert device.freed >= bool(want)
