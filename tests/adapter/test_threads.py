"""One model that several threads call at once: each call gives what it gives alone, bit for bit."""

import copy
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

import hycam
from hycam import HyCAMAttention, router_statistics
from hycam.adapter.threads import Latest, PerThread
from tests.adapter.builders import adapted_model, batch, config, gradients, largest_error, randomise
from tests.decoders import tiny_decoder
from tests.models import tiny_model

THREADS, ROUNDS = 6, 2


def inputs(index: int) -> dict[str, torch.Tensor]:
    """The first two of one shape, with other padding; the others of their own."""
    found = batch(index, rows=2 + index // 2, length=9 + index // 2)
    if index == 1:
        found["attention_mask"][0, 3:] = 0
    return found


def in_threads(work: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """What `work` returns in each of `count` threads that start together."""
    found: list[Any] = [None] * count
    start = threading.Barrier(count)

    def run(index: int) -> None:
        start.wait()
        try:
            found[index] = work(index)
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in found:
        if isinstance(result, Exception):
            raise result
    return found


def interleave(model: nn.Module) -> None:
    """Let other threads run wherever something waits for another module of the same call."""

    def give_way(*_: Any) -> None:
        time.sleep(1e-4)

    for module in model.modules():
        if isinstance(module, HyCAMAttention | nn.Embedding) or "Norm" in type(module).__name__:
            module.register_forward_hook(give_way)


def evaluate(model: nn.Module, index: int) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        found = {"logits": model(**inputs(index)).logits}
    return found | statistics(model)


def train(model: nn.Module, index: int) -> dict[str, torch.Tensor]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    output = model(**inputs(index))
    gradients = torch.autograd.grad(hycam.track_loss(model, output.loss * 0.5), list(trained.values()))
    return {"logits": output.logits.detach()} | dict(zip(trained, gradients, strict=True)) | statistics(model)


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name} {field}": value
        for name, kept in router_statistics(model).items()
        for field, value in vars(kept).items()
    }


SETTINGS = {
    "paper": ("llama", {}),
    "residual": ("llama", {"modulation": "residual"}),
    "released": ("qwen3", {"modulation": "residual", "routing": "hard", "bias": True, "train_norms": True}),
    "fused": ("llama", {"fuse_norm": True}),
    "fused-residual": ("llama", {"fuse_norm": True, "modulation": "residual", "balance_scope": "model"}),
    "pooled": ("mistral", {"balance_scope": "model"}),
    "no-keywords": ("gpt_neo", {}),
    "no-keywords-pooled": ("gpt_neo", {"balance_scope": "model"}),
}


@pytest.mark.parametrize("run", [evaluate, train])
@pytest.mark.parametrize("name", SETTINGS)
def test_each_call_is_as_alone(name, run):
    family, settings = SETTINGS[name]
    base = tiny_decoder(family) if family == "gpt_neo" else tiny_model(family)
    model = get_peft_model(base, config(noise="never", balance_coef=1.0, **settings)).train(run is train)
    randomise(model)
    want = [run(model, index) for index in range(THREADS)]
    interleave(model)
    for index, found in enumerate(in_threads(lambda index: [run(model, index) for _ in range(ROUNDS)])):
        for got in found:
            assert got.keys() == want[index].keys()
            assert all(torch.equal(value, want[index][key]) for key, value in got.items())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_training(use_reentrant):
    model = adapted_model(noise="never", balance_coef=1.0, modulation="residual", fuse_norm=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()

    def run(index):
        # reentrant checkpointing knows `backward` alone, which adds up all threads' gradients
        output = model(**inputs(index))
        output.loss.backward()
        return output.logits.detach()

    want = [run(index) for index in range(3)]
    total = gradients(model)
    interleave(model)
    for got, expected in zip(in_threads(run, 3), want, strict=True):
        assert torch.equal(got, expected)
    assert largest_error(gradients(model), total) < 1e-5


class Tapped(nn.Module):
    """Hands its input from one module to another by a value per thread."""

    def __init__(self, breaks):
        super().__init__()
        self.norm, self.linear, self.breaks = nn.LayerNorm(4), nn.Linear(4, 4), breaks
        self.value = PerThread()
        self.norm.register_forward_pre_hook(lambda norm, args: self.value.set(args[0]))

    def forward(self, hidden):
        normed = self.norm(hidden)
        if self.breaks:
            torch._dynamo.graph_break()
        return self.linear(normed) + self.value.take()


@pytest.mark.parametrize("breaks", [False, True])
def test_compiled(breaks):
    """In one graph, and where the value must outlast one."""
    torch._dynamo.reset()
    model = Tapped(breaks)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not breaks)

    def run(index):
        hidden = torch.full((2, 4), float(index))
        return compiled(hidden), model(hidden)

    assert all(torch.equal(got, want) for got, want in in_threads(run))


def test_the_last_value_of_a_thread_or_of_any():
    latest = Latest()
    assert latest.get() is None
    latest.set("main")
    assert in_threads(lambda _: latest.get(), 1) == ["main"]

    def run(index):
        latest.set(index)
        return latest.get()

    assert in_threads(run) == list(range(THREADS))
    assert latest.get() == "main"


def test_a_thread_without_a_forward_sees_the_last_of_any():
    model = adapted_model(noise="never").eval()
    want = statistics_of(model, 3)
    assert in_threads(lambda _: statistics(model), 1)[0].keys() == want.keys()
    in_threads(lambda _: evaluate(model, 0), 1)
    assert all(torch.equal(value, want[key]) for key, value in statistics(model).items())
    (seen,) = in_threads(lambda _: statistics(model), 1)
    other = statistics_of(model, 0)
    assert all(torch.equal(value, other[key]) for key, value in seen.items())


def statistics_of(model, index):
    evaluate(model, index)
    return statistics(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_calls_of_its_own(copied):
    model = adapted_model(noise="never", modulation="residual", fuse_norm=True).eval()
    want = evaluate(model, 0)
    other = copied(model)
    assert all(torch.equal(value, want[key]) for key, value in evaluate(other, 0).items())
    evaluate(other, 1)
    assert all(torch.equal(value, want[key]) for key, value in statistics(model).items())


def test_a_value_per_thread_is_not_copied():
    value = PerThread()
    value.set(1)
    assert copy.deepcopy(value).get() is None
    assert value.take() == 1
    assert value.take() is None


def test_a_call_that_fails_leaves_nothing_behind():
    """A layer that is called by itself afterwards doesn't take the failed call's mask."""
    model = adapted_model(noise="never", balance_coef=1.0).eval()
    want = evaluate(model, 0)
    with pytest.raises(ValueError, match="attention_mask: got shape"):
        model(input_ids=inputs(0)["input_ids"], attention_mask=torch.ones(5, 9))
    layer = model.base_model.model.model.layers[0].self_attn
    hidden = torch.randn(1, 4, 32)
    positions = model.base_model.model.model.rotary_emb(hidden, torch.arange(4)[None])
    layer(hidden, position_embeddings=positions, attention_mask=None)
    assert router_statistics(model)["base_model.model.model.layers.0.self_attn"].tokens == 4
    assert all(torch.equal(value, want[key]) for key, value in evaluate(model, 0).items())
