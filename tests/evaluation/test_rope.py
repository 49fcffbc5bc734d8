"""Models whose rotary frequencies follow the longest row of a batch: each row is measured as it is alone."""

import pytest
import torch
from datasets import Dataset

from hycam.errors import InputError
from hycam.evaluation.expert_load import evaluate_expert_load
from hycam.evaluation.perplexity import evaluate_perplexity
from hycam.evaluation.rope import Group, group_by_frequencies, longrope_switch
from tests.adapter.builders import adapted_model
from tests.evaluation.rows import make_rows, pack, pad_right
from tests.models import longrope, tiny_config, tiny_model

SWITCH = 12
LONGROPE = longrope(SWITCH)
KINDS = {
    "llama": {"rope_parameters": LONGROPE},
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": SWITCH},
}


@pytest.fixture(scope="module")
def rows() -> Dataset:
    made = make_rows(3, 24)
    assert len({len(ids) > SWITCH for ids in made["input_ids"]}) == 2
    return made


@pytest.mark.parametrize("collator", [pad_right, pack])
@pytest.mark.parametrize("family", KINDS)
def test_perplexity_does_not_depend_on_the_batches(rows, family, collator):
    model = tiny_model(family, **KINDS[family])
    want = evaluate_perplexity(model, {"a": rows}, collator, batch_size=1)["overall"]["nll"]
    assert evaluate_perplexity(model, {"a": rows}, collator, batch_size=5)["overall"]["nll"] == pytest.approx(
        want, rel=1e-5
    )
    with torch.no_grad():  # the equality says something: a long row beside them changes short ones
        batch = pad_right([row for row in rows if len(row["input_ids"]) <= SWITCH])
        width = batch["input_ids"].shape[1]
        batch.pop("labels")
        beside = pad_right(
            [
                *(row for row in rows if len(row["input_ids"]) <= SWITCH),
                max(rows, key=lambda row: len(row["input_ids"])),
            ]
        )
        beside.pop("labels")
        alone, together = model(**batch).logits, model(**beside).logits[:-1, :width]
    assert (alone - together)[batch["attention_mask"].bool()].abs().max() > 0.01


def test_expert_load_does_not_depend_on_the_batches(rows):
    model = adapted_model(sizes=KINDS["llama"])
    want, got = (evaluate_expert_load(model, {"a": rows}, pad_right, batch_size=size)["a"] for size in (1, 5))
    for layer, load in want.items():
        assert got[layer] == pytest.approx(load, rel=1e-5)


def test_groups():
    config = tiny_config(**KINDS["llama"])
    lengths = [5, 13, 12, 20, 9]
    assert longrope_switch(config) == SWITCH
    assert list(group_by_frequencies(lengths, config)) == [Group([3, 1], False), Group([2, 4, 0], False)]
    crossing = [Group([3, 1], False), Group([2], True), Group([4], True), Group([0], False)]
    assert list(group_by_frequencies(lengths, config, growth=4)) == crossing
    assert list(group_by_frequencies(lengths, tiny_config(), growth=4)) == [Group([3, 1, 2, 4, 0], False)]
    assert list(group_by_frequencies(lengths, None)) == [Group([3, 1, 2, 4, 0], False)]


def test_groups_by_the_frequencies_of_one_type_of_layers():
    config = tiny_config()
    config.rope_parameters = {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default"}}
    assert longrope_switch(config) == SWITCH


def test_rows_beyond_the_positions_of_dynamic_rope_are_refused(rows):
    """A longer one would leave its frequencies to those after it."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = tiny_model(rope_parameters=rope, max_position_embeddings=20)
    want = evaluate_perplexity(model, {"a": rows}, pad_right, batch_size=1)["overall"]["nll"]
    assert evaluate_perplexity(model, {"a": rows}, pad_right, batch_size=5)["overall"]["nll"] == pytest.approx(
        want, rel=1e-5
    )
    short = tiny_model(rope_parameters=rope, max_position_embeddings=10)
    with pytest.raises(
        InputError, match=r"rows: 20 tokens in one for a model with dynamic rope, wanted at most its 10"
    ):
        evaluate_perplexity(short, {"a": rows}, pad_right)
