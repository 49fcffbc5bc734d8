import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from hycam.errors import InputError
from hycam.evaluation.batches import device_of
from hycam.evaluation.perplexity import evaluate_perplexity
from tests.evaluation.rows import make_rows, pack, pad_right
from tests.models import tiny_model


def naive_nll(model: nn.Module, rows) -> tuple[float, int]:
    """One row at a time, one token at a time, in float64: -log softmax(logits[t - 1])[token t]."""
    total, tokens = 0.0, 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        for position in range(1, len(row["labels"])):
            if row["labels"][position] == -100:
                continue
            scores = logits[position - 1].double()
            total += float(torch.logsumexp(scores, 0) - scores[row["labels"][position]])
            tokens += 1
    return total, tokens


@pytest.fixture(scope="module")
def tasks():
    return {"short": make_rows(0, 5, longest=6), "long": make_rows(1, 7, longest=20)}


@pytest.mark.parametrize("collator", [pad_right, pack])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_equals_the_naive_sum_in_float64(tasks, collator, batch_size):
    model = tiny_model(dtype=torch.float64)
    result = evaluate_perplexity(model, tasks, collator, batch_size=batch_size)
    total, count = 0.0, 0
    for name, rows in tasks.items():
        with torch.no_grad():
            nll, tokens = naive_nll(model, rows)
        assert result["tasks"][name]["tokens"] == tokens
        assert result["tasks"][name]["nll"] == pytest.approx(nll, rel=1e-12)
        assert result["tasks"][name]["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-12)
        total, count = total + nll, count + tokens
    assert result["overall"]["tokens"] == count
    assert result["overall"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-12)
    weighted = sum(len(tasks[name]) * result["tasks"][name]["perplexity"] for name in tasks)
    average = weighted / sum(map(len, tasks.values()))
    assert result["overall"]["row_average"] == pytest.approx(average, rel=1e-12)
    assert average != pytest.approx(result["overall"]["perplexity"], rel=1e-3)


def test_float32_and_bfloat16_models_stay_close(tasks):
    exact, single, half = (
        evaluate_perplexity(tiny_model().to(dtype), tasks, pad_right)["overall"]["nll"]
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    )
    assert single == pytest.approx(exact, rel=1e-6)
    assert half == pytest.approx(exact, rel=3e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_packed_equals_padded(tasks, family):
    model = tiny_model(family)
    padded = evaluate_perplexity(model, tasks, pad_right)["overall"]
    packed = evaluate_perplexity(model, tasks, pack)["overall"]
    assert packed["tokens"] == padded["tokens"]
    assert packed["nll"] == pytest.approx(padded["nll"], rel=1e-5)


def test_uniform_logits_give_the_vocabulary_as_perplexity(tasks):
    model = tiny_model()
    nn.init.zeros_(model.get_output_embeddings().weight)
    assert evaluate_perplexity(model, tasks, pad_right)["overall"]["perplexity"] == pytest.approx(128, rel=1e-6)


def test_modes_of_modules_come_back(tasks):
    model = tiny_model()
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    seen = []
    model.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    evaluate_perplexity(model, tasks, pad_right)
    assert set(seen) == {(False, False)}
    assert [module.training for module in model.modules()] == before


def test_peft_model_and_its_base_differ_and_match_naive(tasks):
    model = get_peft_model(tiny_model(), LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
    adapted = evaluate_perplexity(model, tasks, pad_right)["overall"]
    with model.disable_adapter():
        base = evaluate_perplexity(model, tasks, pad_right)["overall"]
    assert base["nll"] == pytest.approx(evaluate_perplexity(tiny_model(), tasks, pad_right)["overall"]["nll"], rel=1e-9)
    assert abs(adapted["nll"] - base["nll"]) > 1e-2 * base["nll"]
    with torch.no_grad():
        nll = sum(naive_nll(model.eval(), rows)[0] for rows in tasks.values())
    assert adapted["nll"] == pytest.approx(nll, rel=1e-5)


def test_distributed_wrapper_gives_the_same_numbers(tasks, tmp_path):
    plain = evaluate_perplexity(tiny_model(), tasks, pad_right)
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        assert evaluate_perplexity(DistributedDataParallel(tiny_model()), tasks, pad_right) == plain
    finally:
        torch.distributed.destroy_process_group()


def test_offloaded_parts_are_computed_with_where_their_mesh_is(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model, mesh = nn.Linear(2, 2, device="meta"), init_device_mesh("cpu", (1,))
        assert device_of(model).type == "meta"
        for name in ("weight", "bias"):  # parts that lie elsewhere than where they are gathered
            part = DTensor.from_local(getattr(model, name).detach(), mesh, [Replicate()])
            assert part.device.type == "meta"
            setattr(model, name, nn.Parameter(part))
        assert device_of(model).type == "cpu"
    finally:
        torch.distributed.destroy_process_group()


def test_progress_counts_every_row(tasks):
    counts: list[int] = []
    evaluate_perplexity(tiny_model(), tasks, pad_right, batch_size=4, progress=counts.append)
    assert counts == [4, 1, 4, 3]


@pytest.mark.parametrize(
    ("rows", "batch_size", "message"),
    [
        ({}, 8, "tasks: none given"),
        ({"empty": make_rows(0, 0)}, 8, "'empty' has no response token"),
        ({"a": make_rows(0, 2)}, 0, "batch_size: 0 given"),
    ],
)
def test_wrong_input_is_named(rows, batch_size, message):
    with pytest.raises(InputError, match=message):
        evaluate_perplexity(tiny_model(), rows, pad_right, batch_size=batch_size)
