"""Evaluation without gradients: always by the weights that are there, and with nothing done that nobody asks for."""

import copy
import io
import threading

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hycam import hotswap_adapter, router_statistics
from hycam_kernels.output import DeferredRouterMeans
from tests.adapter.builders import adapted_model, batch, config, layers_of, randomise
from tests.models import tiny_model


def logits(model: nn.Module, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(), **options).logits


def factors(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "hycam_lora_" in name or "hycam_shared" in name]


def by_the_equations(model: nn.Module) -> torch.Tensor:
    """The logits by the op's path with a backward, which keeps no weight from one call to the next."""
    with torch.enable_grad():
        return model(**batch()).logits.detach()


def step(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**batch()).loss.backward()
    optimizer.step()


def load_state(model):
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})


def assign_data(model):
    for parameter in factors(model):
        parameter.data = parameter.data * 1.5


def copy_into_data(model):
    for parameter in factors(model):
        parameter.data.copy_(parameter.data * 1.5)


@torch.no_grad()
def write_without_gradients(model):
    for parameter in factors(model):
        parameter.mul_(1.5)


@torch.inference_mode()
def write_in_inference_mode(model):
    for parameter in factors(model):
        parameter.mul_(1.5)


def write_through_a_view(model):
    for parameter in factors(model):
        parameter.detach().numpy()[...] *= 1.5


def set_parameters_anew(model):
    for layer in layers_of(model).values():
        for parameters in (layer.hycam_lora_a, layer.hycam_lora_n, layer.hycam_lora_b):
            parameters["default"].weight = nn.Parameter(parameters["default"].weight.detach() * 1.5)


def activate_another(model):
    model.add_adapter("other", config())
    randomise(model, seed=5)
    logits(model)
    model.set_adapter("other")


def delete_and_add_again(model):
    model.add_adapter("other", config())
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", config())
    model.set_adapter("default")
    randomise(model, seed=5)


def cast(model):
    model.to(torch.bfloat16)


def cast_and_back(model):
    model.to(torch.bfloat16).to(torch.float32)


WRITES = {
    "optimizer step": step,
    "load_state_dict": load_state,
    ".data =": assign_data,
    ".data.copy_": copy_into_data,
    "in place without gradients": write_without_gradients,
    "in place in inference mode": write_in_inference_mode,
    "through shared memory": write_through_a_view,
    "parameters set anew": set_parameters_anew,
    "set_adapter": activate_another,
    "delete and add again": delete_and_add_again,
    "to another dtype": cast,
    "to another dtype and back": cast_and_back,
}


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_evaluation_follows(write, inference_mode):
    model = adapted_model().eval()
    with torch.inference_mode(inference_mode):
        before = logits(model)
        assert torch.equal(logits(model), before)
    write(model)
    model.eval()
    with torch.inference_mode(inference_mode):
        got = logits(model)
    want = by_the_equations(model)
    exact = got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-4 if exact else 0.05, atol=1e-4 if exact else 0.2)
    assert (got - before).abs().max() > (1e-3 if exact else 1e-4)


def test_evaluation_follows_hotswap(tmp_path):
    other = adapted_model()
    randomise(other, seed=5)
    other.save_pretrained(tmp_path)
    model = adapted_model().eval()
    before = logits(model)
    hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(other.eval()))
    assert not torch.equal(logits(model), before)


def test_evaluation_follows_writes_into_inference_tensors():
    """Parameters made under inference mode have no version that a write could raise."""
    with torch.inference_mode():
        model = adapted_model().eval()
        before = logits(model)
        write_in_inference_mode(model)
        got = logits(model)
        copied = get_peft_model(tiny_model(), config())
        copied.load_state_dict(model.state_dict(), assign=True)
    assert not torch.equal(got, before)
    assert torch.equal(logits(copied.eval()), got)


def test_evaluation_follows_a_deep_copy_apart():
    model = adapted_model().eval()
    before = logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), before)
    write_without_gradients(other)
    assert torch.equal(logits(model), before)
    got = logits(other)
    write_without_gradients(model)
    assert torch.equal(logits(model), got)


def test_evaluation_follows_the_mode():
    model = adapted_model(noise="never").eval()
    logits(model)
    model.train()
    step(model)
    torch.testing.assert_close(logits(model.eval()), by_the_equations(model), rtol=1e-4, atol=1e-4)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_evaluation_follows_under_ddp():
    model = adapted_model(noise="never", balance_coef=0.0).eval()
    before = logits(model)
    wrapped = DistributedDataParallel(model)
    assert torch.equal(logits(wrapped), before)
    step(wrapped)
    got = logits(wrapped)
    torch.testing.assert_close(got, by_the_equations(model), rtol=1e-4, atol=1e-4)
    assert not torch.equal(got, before)


@pytest.mark.usefixtures("process_group")
def test_evaluation_follows_under_fsdp2():
    """Whose shards take the parameters' place between forwards."""
    model = adapted_model().eval()
    before = logits(model)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert torch.equal(logits(model), before)
    with torch.no_grad():
        for parameter in factors(model):
            parameter.mul_(1.5)
    got = logits(model)
    want = adapted_model().eval()
    write_without_gradients(want)
    torch.testing.assert_close(got, logits(want), rtol=1e-5, atol=1e-5)
    assert not torch.equal(got, before)


def test_evaluation_follows_in_several_threads():
    """Each of two models is written to by its own thread, which reads what it wrote."""
    models = [adapted_model().eval() for _ in range(2)]
    failures = []

    def run(model, factor):
        for _ in range(5):
            with torch.no_grad():
                for parameter in factors(model):
                    parameter.mul_(factor)
            if not torch.allclose(logits(model), by_the_equations(model), rtol=1e-4, atol=1e-4):
                failures.append(factor)

    threads = [
        threading.Thread(target=run, args=(model, factor)) for model, factor in zip(models, (1.3, 0.7), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_one_model_in_several_threads():
    model = adapted_model().eval()
    layer = next(iter(layers_of(model).values()))
    hidden = torch.randn(2, 5, 32)
    want = layer.modulation(hidden)
    got = []
    threads = [threading.Thread(target=lambda: got.append(layer.modulation(hidden))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4
    assert all(torch.equal(one, want) for one in got)


def test_nothing_is_kept_beside_the_parameters():
    """No copy of a weight stays with the layers, in evaluation or after it."""
    model = adapted_model().eval()

    def held(layer) -> int:
        kept = [value for latest in layer.statistics.values() for value in vars(latest.get().means).values()]
        return sum(value.numel() for value in kept if isinstance(value, torch.Tensor))

    state, count = set(model.state_dict()), sum(p.numel() for p in model.parameters())
    logits(model)
    assert set(model.state_dict()) == state
    assert sum(p.numel() for p in model.parameters()) == count
    assert not any("hycam" in name for name, _ in model.named_buffers())
    layers = layers_of(model).values()
    # p and logits [E, T], and the token mask
    assert all(held(layer) <= 2 * 3 * 27 + 27 for layer in layers)
    file = io.BytesIO()
    torch.save(model.base_model.model.model.layers[0].self_attn.statistics, file)


def test_the_routers_means_are_made_when_they_are_read():
    model = adapted_model(noise="never").eval()
    with torch.enable_grad():
        model(**batch())
        want = router_statistics(model)
    inputs = batch()
    inputs["attention_mask"] = inputs["attention_mask"].bool()
    with torch.no_grad():
        model(**inputs)
    layers = layers_of(model)
    for layer in layers.values():
        means = layer.statistics["default"].get().means
        assert isinstance(means, DeferredRouterMeans)
        assert "load" not in vars(means)
    # what the caller does with its mask afterwards is no matter
    inputs["attention_mask"].fill_(False)
    for name, got in router_statistics(model).items():
        torch.testing.assert_close(got.load, want[name].load)
        torch.testing.assert_close(got.balance_loss, want[name].balance_loss)
        assert got.tokens == want[name].tokens
        assert not got.load.requires_grad


def test_only_layers_in_evaluation_put_their_means_off():
    """A balance loss over the model's layers takes the means of those that are in evaluation too."""
    model = adapted_model(noise="never", balance_coef=1.0, balance_scope="model")
    first, *_ = layers_of(model).values()
    first.eval()
    first.requires_grad_(False)
    model(**batch()).loss.backward()
    want = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert want
    assert all(gradient.isfinite().all() for gradient in want)


def test_generation_with_a_cache_is_generation_without():
    model = adapted_model().eval()
    ids = batch()["input_ids"][2:]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    assert torch.equal(cached, whole)
    assert all(kept.tokens == ids.shape[1] + 5 for kept in router_statistics(model).values())
