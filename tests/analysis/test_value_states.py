import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from hycam import HyCAMConfig
from hycam.analysis.value_states import embed_value_states, token_value_states
from hycam.data.collation import Collator
from hycam.errors import InputError
from tests.adapter.builders import randomise
from tests.models import tiny_model

COLLATOR = Collator(0)
COUNT = 1000


def token_rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = [9 - n for n in range(count)]
    ids = [torch.randint(3, 128, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


@pytest.mark.parametrize("layer", [0, 1, -1])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt_neox"])
def test_every_token_has_the_value_projection_of_its_own(family, layer):
    """Against a hook on the projection, one row at a time and so without padding."""
    model = tiny_model(family)
    name = {"phi3": "self_attn.qkv_proj", "gpt_neox": "attention.query_key_value"}.get(family, "self_attn.v_proj")
    projection = model.get_submodule(f"{model.base_model_prefix}.layers.{layer % 2}.{name}")
    seen = []
    projection.register_forward_hook(lambda module, args, output: seen.append(output[0].double()))
    rows = token_rows(4, 0)
    with torch.no_grad():
        for ids in rows["input_ids"]:
            model(torch.tensor([ids]))
    if family == "phi3":
        seen = [values[:, -16:] for values in seen]  # query, key and value in one
    if family == "gpt_neox":
        seen = [values.unflatten(-1, (4, 3, 8))[:, :, 2].flatten(1) for values in seen]  # by head
    want = torch.cat(seen)
    got = token_value_states(model, {"a": rows}, COLLATOR, count=1000, layer=layer, batch_size=3)
    assert got["a"].dtype == torch.float32 and len(got["a"]) == sum(map(len, rows["input_ids"]))
    torch.testing.assert_close(got["a"].double(), want, rtol=1e-5, atol=1e-6)
    some = token_value_states(model, {"a": rows}, COLLATOR, count=7, layer=layer, batch_size=2)["a"]
    assert len(some) == 7
    assert ((some[:, None].double() - want).norm(dim=-1).min(-1).values < 1e-4).all()


def test_hycam_moves_them_from_the_layer_after_its_first():
    model = get_peft_model(tiny_model(), HyCAMConfig(r=4, num_experts=3, task_type="CAUSAL_LM"))
    randomise(model)
    rows = {"a": token_rows(3, 0), "b": token_rows(2, 1)}
    for layer, moved in ((0, False), (1, True)):
        adapted = token_value_states(model, rows, COLLATOR, count=COUNT, layer=layer)
        with model.disable_adapter():
            base = token_value_states(model, rows, COLLATOR, count=COUNT, layer=layer)
        assert [len(states) for states in adapted.values()] == [9 + 8 + 7, 9 + 8]
        assert all(torch.equal(adapted[task], base[task]) != moved for task in rows)


def test_an_adapter_of_the_projection_itself_counts():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    adapted = token_value_states(model, {"a": token_rows(2, 0)}, COLLATOR, count=COUNT, layer=0)
    with model.disable_adapter():
        base = token_value_states(model, {"a": token_rows(2, 0)}, COLLATOR, count=COUNT, layer=0)
    assert not torch.allclose(adapted["a"], base["a"])


@pytest.mark.parametrize("layer", [2, -3])
def test_a_layer_that_is_not_there(layer):
    with pytest.raises(InputError, match=rf"layer: {layer} given, the model has 2"):
        token_value_states(tiny_model(), {"a": token_rows(1, 0)}, COLLATOR, count=COUNT, layer=layer)


def test_a_cache_with_a_window_is_refused():
    model = tiny_model("mistral", sliding_window=4)
    with pytest.raises(InputError, match=r"layer: -1 given, whose cache keeps .* of 9 tokens"):
        token_value_states(model, {"a": token_rows(1, 0)}, COLLATOR, count=COUNT)


@pytest.mark.parametrize("tasks", [{}, {"a": token_rows(1, 0).select([])}])
def test_no_rows(tasks):
    with pytest.raises(InputError, match=r"tasks: .* given, at least one is wanted"):
        token_value_states(tiny_model(), tasks, COLLATOR, count=COUNT)


def clusters(distance):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(20, 6, generator=generator) + shift
        for name, shift in (("a", 0.0), ("b", distance), ("c", -distance))
    }


def test_the_embedding_keeps_clusters_and_says_how_far_they_are():
    embedding = embed_value_states(clusters(30.0))
    points = {task: torch.tensor(values) for task, values in embedding["points"].items()}
    assert {task: values.shape for task, values in points.items()} == dict.fromkeys("abc", (20, 2))
    centres = {task: values.mean(0) for task, values in points.items()}
    for task, values in points.items():
        nearest = torch.stack([(values - centre).norm(dim=-1) for centre in centres.values()]).argmin(0)
        assert (nearest == list(centres).index(task)).all()
    assert embedding["silhouette"] > 0.9
    assert abs(embed_value_states(clusters(0.0))["silhouette"]) < 0.1
    assert embedding["perplexity"] == pytest.approx(59 / 3)
    assert embed_value_states(clusters(30.0)) == embedding, "the same rows give the same picture"


def test_the_silhouette_by_hand():
    """Rows 0 and 1 against 10 and 11 on a line: mean of 1 - a / b."""
    states = {"a": torch.tensor([[0.0, 3.0], [1.0, 3.0]]), "b": torch.tensor([[10.0, 3.0], [11.0, 3.0]])}
    want = (2 * (1 - 1 / 10.5) + 2 * (1 - 1 / 9.5)) / 4
    assert embed_value_states(states)["silhouette"] == pytest.approx(want)


def test_one_task_has_no_silhouette_and_three_tokens_no_embedding():
    assert embed_value_states({"a": torch.randn(5, 3)})["silhouette"] is None
    with pytest.raises(InputError, match="states: 3 tokens given, at least 4"):
        embed_value_states({"a": torch.randn(3, 3)})


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(
        InputError, match=r"scikit-learn is not installed, wanted: pip install 'hycam-kernels\[analysis\]'"
    ):
        embed_value_states({"a": torch.zeros(5, 2)})
