import pytest
import torch
from peft import get_peft_model

from hycam import HyCAMAttention, HyCAMConfig
from hycam.errors import InputError
from hycam.evaluation.expert_load import evaluate_expert_load
from tests.evaluation.rows import make_rows, pack, pad_right
from tests.models import tiny_model


def adapted_model(**settings):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), HyCAMConfig(r=4, num_experts=3, task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "hycam" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def tasks():
    return {"short": make_rows(0, 5, longest=6), "long": make_rows(1, 7, longest=20)}


def naive_load(model, rows) -> dict[str, torch.Tensor]:
    """softmax(h W_router^T / tau) of every token, one row at a time, averaged over all tokens."""
    weights: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, HyCAMAttention):

            def record(layer, args, kwargs, name=name):
                router = layer.hycam_router["default"].weight
                weights.setdefault(name, []).append(torch.softmax(kwargs["hidden_states"][0] @ router.T / 0.5, -1))

            handles.append(layer.register_forward_pre_hook(record, with_kwargs=True))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row["input_ids"]]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(of_layer).double().mean(0) for name, of_layer in weights.items()}


@pytest.mark.parametrize("collator", [pad_right, pack])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_equals_the_mean_over_all_tokens(tasks, collator, batch_size):
    model = adapted_model().eval()
    loads = evaluate_expert_load(model, tasks, collator, batch_size=batch_size)
    for task, rows in tasks.items():
        expected = naive_load(model, rows)
        assert len(loads[task]) == len(expected) == 2
        for (layer, load), (name, mean) in zip(loads[task].items(), expected.items(), strict=True):
            assert name.endswith(layer)
            assert load == pytest.approx(mean.tolist(), rel=1e-5)
            assert sum(load) == pytest.approx(1, rel=1e-6)
            assert max(load) - min(load) > 0.02, "a router that prefers nothing would hide a wrong average"
    assert loads["short"] != loads["long"]


def test_is_noise_free_and_leaves_the_mode(tasks):
    model = adapted_model().train()
    first = evaluate_expert_load(model, tasks, pad_right)
    assert evaluate_expert_load(model, tasks, pad_right) == first
    assert all(module.training for module in model.modules())


def test_wrong_input_is_named(tasks):
    with pytest.raises(InputError, match="an active adapter that has them is wanted"):
        evaluate_expert_load(adapted_model(experts="none"), tasks, pad_right)
    with pytest.raises(InputError, match="tasks: none given"):
        evaluate_expert_load(adapted_model(), {}, pad_right)
    with pytest.raises(InputError, match="'empty' has no row"):
        evaluate_expert_load(adapted_model(), {"empty": make_rows(0, 0)}, pad_right)
    with pytest.raises(InputError, match="adapter_name: got None, want an adapter of the model"):
        evaluate_expert_load(tiny_model(), tasks, pad_right)
