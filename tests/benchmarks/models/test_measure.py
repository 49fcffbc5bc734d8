"""Whole models by method: a wrong one is found and not timed, and what is recorded is what a step needs."""

import gc
import json
from dataclasses import replace

import pytest
import torch
from transformers.models.llama import modeling_llama

from benchmarks import end_to_end
from benchmarks.cpu import measure_inference
from benchmarks.harness.record import Budget, Record
from benchmarks.models import measure as models
from benchmarks.models import methods
from benchmarks.models.backbones import CONFIGS, ModelShape, build
from benchmarks.models.generation import Generation, check_generation
from benchmarks.models.measure import measure_attention, measure_generation, measure_steps
from benchmarks.models.methods import METHODS, EagerHyCAMAttention
from benchmarks.models.training import Setting, TrainingStep, adapted, check_attention, check_step
from benchmarks.op.checks import WrongResultError
from benchmarks.op.shapes import Shape
from hycam import HyCAMAttention
from hycam.live_bytes import LiveBytes
from hycam_kernels import hycam_modulation
from tests.benchmarks.fakes import make_session

SHAPE = ModelShape("tiny-llama", 1, 16, num_experts=2, rank=4)
CPU = torch.device("cpu")
# the fused backend needs a GPU; it shares all of the code but the op with the others
ON_CPU = tuple(name for name in METHODS if name != "hycam-fused")


@pytest.mark.parametrize("name", ON_CPU)
def test_every_method_is_right(name):
    check_step(name, SHAPE, torch.bfloat16, CPU)
    check_step(name, replace(SHAPE, model="tiny-qwen2"), torch.float32, CPU, Setting(checkpointing=True))


@pytest.mark.parametrize("name", ["frozen", "hycam-eager", "hycam-torch"])
def test_layers_and_generation_are_right(name):
    check_attention(name, SHAPE, torch.bfloat16, CPU)
    check_generation(name, SHAPE, torch.bfloat16, CPU)


class SlightlyWrong(HyCAMAttention):
    def _modulate(self, *args, **options):
        out = super()._modulate(*args, **options)
        return out._replace(hidden_states=out.hidden_states * 1.02)


class LosesAGradient(HyCAMAttention):
    def _modulate(self, *args, **options):
        held = self.hycam_lora_n["default"].weight
        held.requires_grad_(False)
        try:
            return super()._modulate(*args, **options)
        finally:
            held.requires_grad_(True)


def faulty(fault):
    def adapt(model, shape):
        adapted_model = METHODS["hycam-eager"](model, shape)
        for module in adapted_model.modules():
            if isinstance(module, EagerHyCAMAttention):
                module.__class__ = fault
        return adapted_model

    return adapt


@pytest.mark.parametrize("check", [check_step, check_attention, check_generation])
def test_a_wrong_adapter_is_found(check, monkeypatch):
    monkeypatch.setitem(METHODS, "hycam-torch", faulty(SlightlyWrong))
    with pytest.raises(WrongResultError, match=r"hycam-torch: .* not timed"):
        check("hycam-torch", SHAPE, torch.float32, CPU)


@pytest.mark.parametrize("check", [check_step, check_attention])
def test_a_lost_gradient_is_found(check, monkeypatch):
    monkeypatch.setitem(METHODS, "hycam-torch", faulty(LosesAGradient))
    with pytest.raises((WrongResultError, RuntimeError), match=r"hycam_lora_n|not have been used"):
        check("hycam-torch", SHAPE, torch.float32, CPU)


def test_another_start_than_the_backbones_is_found(monkeypatch):
    def shifted(model, shape):
        adapted_model = METHODS["lora"](model, shape)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(3)
        return adapted_model

    monkeypatch.setitem(METHODS, "full", shifted)
    with pytest.raises(WrongResultError, match="full: the first loss"):
        check_step("full", SHAPE, torch.float32, CPU)


def test_a_gradient_that_never_comes_is_found(monkeypatch):
    def unused(model, shape):
        model.unused = torch.nn.Parameter(torch.ones(2))
        return model

    monkeypatch.setitem(METHODS, "full", unused)
    with pytest.raises(WrongResultError, match="full: unused has no finite gradient"):
        check_step("full", SHAPE, torch.float32, CPU)


def test_eager_is_the_op_with_its_noise():
    """Under explicit noise; its own is torch's."""
    model = adapted("hycam-eager", SHAPE, torch.float64, CPU)
    layer = next(module for module in model.modules() if isinstance(module, EagerHyCAMAttention))
    hidden, attn = torch.randn(2, 6, 256, dtype=torch.float64)
    drawn = []

    def own_op(*args, **options):
        drawn.append(options["gumbel"])
        return hycam_modulation(*args, backend="torch", **options)

    torch.manual_seed(3)
    got = layer._modulate("default", hidden, attn, seed=torch.tensor(1), residual=None, token_mask=None)
    torch.manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "modulation_reference", own_op)
        want = layer._modulate("default", hidden, attn, seed=torch.tensor(1), residual=None, token_mask=None)
    torch.testing.assert_close(got.hidden_states, want.hidden_states)
    assert drawn[0].shape == (6, 2)
    assert abs(drawn[0].mean().item() - 0.577) < 1.5


@pytest.mark.parametrize("name", ["hycam-torch", "lora"])
def test_nothing_that_is_trained_is_zero(name):
    model = adapted(name, SHAPE, torch.bfloat16, CPU)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(parameter.any() for parameter in trained.values())
    again = dict(adapted(name, SHAPE, torch.bfloat16, CPU).named_parameters())
    assert all(torch.equal(parameter, again[n]) for n, parameter in trained.items())


@pytest.mark.parametrize(
    ("name", "billions"), [("Llama-3.2-1B", 1.236), ("Llama-3.1-8B", 8.030), ("Qwen2.5-7B", 7.616)]
)
def test_backbones_have_the_sizes_of_their_names(name, billions):
    model = build(ModelShape(name, 1, 1), torch.bfloat16, torch.device("meta"))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)
    assert name in CONFIGS


def test_liger_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: False)
    with pytest.raises(ImportError, match="liger"):
        build(SHAPE, torch.float32, CPU, liger=True)


def test_liger_reaches_one_model_alone(monkeypatch):
    def apply(model, kernels):
        assert kernels == {"rope": False}
        modeling_llama.LlamaRMSNorm = torch.nn.Identity
        model.model.norm = torch.nn.Identity()

    monkeypatch.setattr("transformers.integrations.liger.apply_liger_kernel", apply)
    assert isinstance(build(SHAPE, torch.float32, CPU, liger=True).model.norm, torch.nn.Identity)
    assert modeling_llama.LlamaRMSNorm is not torch.nn.Identity


def test_live_bytes_are_those_of_living_storages():
    outside = torch.randn(100)
    with LiveBytes([outside]) as count:
        a = outside * 2
        view = a[:10]
        outside.mul_(1)
        assert count.live == 400
        b = torch.cat([a, a])
        assert (count.live, count.peak) == (1200, 1200)
        del b
        gc.collect()
        assert (count.live, count.peak) == (400, 1200)
        del a
        assert count.live == 400  # the view holds it
        del view
        assert count.live == 0


def test_what_a_step_keeps_is_what_autograd_saves():
    """Against torch's own hooks, which see each tensor that is saved."""
    step = TrainingStep("hycam-torch", SHAPE, torch.float32, CPU)
    found = step.memory()
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.forward(0)
    known = {tensor.untyped_storage().data_ptr() for tensor in step.resident()}
    kept = sum(size for pointer, size in saved.items() if pointer not in known)
    assert loss.requires_grad
    assert kept == pytest.approx(found["kept_bytes"], rel=0.06)
    assert found["peak_bytes"] > found["resident_bytes"] + found["kept_bytes"]


def test_memory_of_methods_is_ordered():
    found = {name: TrainingStep(name, SHAPE, torch.float32, CPU).memory() for name in ON_CPU}
    trained = {name: TrainingStep(name, SHAPE, torch.float32, CPU).trainable_parameters for name in ON_CPU}
    checkpointed = TrainingStep("hycam-torch", SHAPE, torch.float32, CPU, Setting(checkpointing=True)).memory()
    for name, memory in found.items():
        # two moments of every trained parameter, and a step counter for each tensor
        assert memory["optimizer_bytes"] == pytest.approx(8 * trained[name], rel=0.01)
    assert found["frozen"]["kept_bytes"] < found["hycam-torch"]["kept_bytes"] < found["hycam-eager"]["kept_bytes"]
    assert checkpointed["kept_bytes"] < 0.5 * found["hycam-torch"]["kept_bytes"]


def test_a_wrong_method_is_not_timed_and_a_failing_one_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "hycam-torch", faulty(SlightlyWrong))
    session = make_session(tmp_path / "r.json")
    measure_steps(session, SHAPE, torch.float32, ("frozen", "hycam-torch", "hycam-fused"))
    by_peer = {entry["peer"]: entry for entry in session.record.entries if entry["group"] == "step"}
    assert by_peer["frozen"]["samples_us"] == [1.0, 2.0, 3.0]
    assert "relative error" in by_peer["hycam-torch"]["wrong"]
    assert "CUDA device" in by_peer["hycam-fused"]["error"]
    for name in ("hycam-torch", "hycam-fused"):
        assert "samples_us" not in by_peer[name]


def test_too_little_memory_is_recorded(tmp_path, monkeypatch):
    def explode(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(models, "TrainingStep", explode)
    session = make_session(tmp_path / "r.json")
    measure_steps(session, SHAPE, torch.float32, ("frozen",))
    (entry,) = session.record.entries
    assert entry["error"].startswith("OutOfMemoryError")


def test_methods_follow_each_other_on_cuda_and_take_turns_on_a_cpu(tmp_path, monkeypatch):
    """On CUDA the memory of one method is free before the next is built."""
    built: list[str] = []
    alive: list[int] = []

    class Step:
        trainable_parameters = 0
        living = 0

        def __init__(self, name, *args) -> None:
            built.append(name)
            Step.living += 1

        def __del__(self) -> None:
            Step.living -= 1

        def memory(self):
            alive.append(Step.living)
            return {}

        def work(self):
            return models.Work(lambda i: i, lambda i: None, 1)

    monkeypatch.setattr(models, "TrainingStep", Step)
    monkeypatch.setattr(models, "check_step", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: built.append("emptied"))
    for device, order, most in (("cpu", ["a", "b"], 2), ("cuda", ["a", "emptied", "b", "emptied"], 1)):
        session = make_session(tmp_path / f"{device}.json")
        session.device = torch.device(device)
        built.clear()
        alive.clear()
        measure_steps(session, SHAPE, torch.float32, ("a", "b"))
        assert built == order
        assert max(alive) == most
        beside = [entry["beside"] for entry in session.record.entries if entry["group"] == "step"]
        assert beside == ([["a", "b"]] * 2 if device == "cpu" else [["a"], ["b"]])


def test_what_does_not_fit_the_budget_is_named(tmp_path):
    session = make_session(tmp_path / "r.json", seconds=5)
    measure_attention(session, SHAPE, torch.float32, ("frozen",))
    measure_generation(session, SHAPE, torch.float32, ("frozen",), 4)
    assert [entry["group"] for entry in session.record.entries] == ["attention", "generation"]
    assert all("needed" in entry["skipped"] for entry in session.record.entries)


def test_inference_on_a_cpu_times_every_method_in_both_dtypes(tmp_path):
    session = make_session(tmp_path / "r.json")
    measure_inference(session, [Shape(1, 32, 3, 8)], [SHAPE])
    entries = session.record.entries
    assert all("samples_us" in entry for entry in entries), entries
    timed = {(entry["group"], entry["dtype"], entry["peer"]) for entry in entries}
    dtypes, calls, methods = (
        ("float32", "bfloat16"),
        ("eager", "torch"),
        ("frozen", "hycam-eager", "hycam-torch", "lora"),
    )
    assert timed == {
        *(("decode", dtype, peer) for dtype in dtypes for peer in calls),
        *(("generation", dtype, peer) for dtype in dtypes for peer in methods),
    }


def test_generation_makes_the_tokens_it_counts():
    generation = Generation("hycam-torch", SHAPE, torch.float32, CPU, new_tokens=5)
    assert generation.run(0).shape == (1, 16 + 5)
    assert not torch.equal(generation.run(0), generation.run(1))


def test_a_token_of_the_static_cache_is_the_models_and_waits_for_nothing():
    """A CUDA graph can hold it: no operator brings a value to the host, and every run starts at the prompt's end."""
    generation = Generation("hycam-torch", SHAPE, torch.float32, CPU, new_tokens=5)
    work = generation.token_work()
    first = work.run(work.setup(0))

    class Waits(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    with Waits():
        again = work.run(work.setup(0))
    assert torch.equal(first, again)
    prompt = generation.prompts[0]
    whole = generation.model(input_ids=torch.cat([prompt, prompt[:, :1]], 1)).logits[:, -1]
    torch.testing.assert_close(first[:, -1], whole, rtol=1e-4, atol=1e-5)
    assert work.on_device


def test_the_gpu_run_takes_what_a_goal_compares_first(tmp_path, monkeypatch):
    """Every method in both settings at every shape, and the most telling first."""
    calls = []
    for name in ("measure_steps", "measure_generation", "measure_attention", "measure_longest"):

        def note(session, shape, dtype, names, *more, name=name):
            calls.append((name, shape.model, tuple(names), [str(part) for part in more]))

        monkeypatch.setattr(end_to_end, name, note)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    record = Record(tmp_path / "r.json", {})
    end_to_end.measure_on_gpu(record, Budget(100), liger=True)
    steps = [(model, *more) for name, model, _, more in calls if name == "measure_steps"]
    settings = ["plain", "checkpointing", "liger", "checkpointing, liger"]
    shapes = ["Llama-3.1-8B", "Llama-3.2-1B", "Qwen2.5-7B"]
    assert steps == [(model, setting) for model in shapes for setting in settings]
    assert calls[0][2][:3] == ("frozen", "hycam-fused", "lora")
    assert all(set(names) == set(METHODS) for name, _, names, _ in calls if name == "measure_steps")
    assert {name for name, *_ in calls} == {
        "measure_steps", "measure_generation", "measure_attention", "measure_longest",
    }  # fmt: skip
    assert "gpu_after" in json.loads(record.path.read_text())
    calls.clear()
    end_to_end.measure_on_gpu(record, Budget(100), end_to_end.MODELS[1:2], ["longest", "steps"])
    assert [(name, model) for name, model, *_ in calls] == [
        ("measure_longest", "Qwen2.5-7B"), ("measure_steps", "Llama-3.2-1B"), ("measure_steps", "Llama-3.2-1B"),
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA it takes the real shapes")
@pytest.mark.parametrize(("outcome", "code"), [({"samples_us": [1.0]}, 0), ({"error": "no"}, 1)])
def test_the_command_says_whether_it_timed_a_step(outcome, code, tmp_path, monkeypatch):
    def measured(session):
        session.add("step", SHAPE, peer="frozen", **outcome)

    monkeypatch.setattr(end_to_end, "measure_models", measured)
    assert end_to_end.main(["--out", str(tmp_path / "r.json"), "--commit", "abc+"]) == code
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["git"] == {"commit": "abc", "dirty": True}
    assert record["packages"]["transformers"]
