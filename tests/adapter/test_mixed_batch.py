"""A batch whose rows use different adapters."""

import re

import pytest
import torch
from peft import get_peft_model

from hycam import router_statistics
from tests.adapter.builders import adapted_model, batch, config, randomise
from tests.adapter.test_threads import in_threads, interleave
from tests.decoders import tiny_decoder
from tests.models import tiny_model

NAMES = ["first", "__base__", "second", "first", "third"]


def three_adapters(family="llama", **settings):
    """In evaluation; the third has other settings, and adapts the last layer alone."""
    base = tiny_decoder(family) if family == "falcon" else tiny_model(family)
    model = get_peft_model(base, config(noise="never", **settings), adapter_name="first")
    model.add_adapter("second", config(noise="never", **settings))
    model.add_adapter("third", config(r=2, num_experts=2, bias=True, noise="never", layers_to_transform=[1]))
    randomise(model)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "modules_to_save" in name:
                parameter.add_(0.1 * (1 + index % 5) * torch.randn_like(parameter))
    return model.eval()


def inputs(rows=5):
    found = batch(rows=rows)
    del found["labels"]
    return found


def by_each(model, run):
    """What `run` gives for the whole batch, by adapter, the base model among them."""
    found = {}
    for name in ("first", "second", "third"):
        model.set_adapter(name)
        found[name] = run()
    model.set_adapter("first")
    with model.disable_adapter():
        found["__base__"] = run()
    return found


SETTINGS = {
    "paper": ("llama", {}),
    "released": ("llama", {"modulation": "residual", "routing": "hard", "bias": True, "train_norms": True}),
    "trained-modules": ("gpt2", {"modules_to_save": ["lm_head", "wte"], "shared": "slora"}),
    "no-keywords": ("falcon", {}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_each_row_has_its_adapter(name):
    family, settings = SETTINGS[name]
    model = three_adapters(family, **settings)

    @torch.no_grad()
    def run(**options):
        return model(**inputs(), **options).logits

    alone = by_each(model, run)
    assert len({value.sum().item() for value in alone.values()}) == 4
    mixed = run(adapter_names=NAMES)
    for row, adapter in enumerate(NAMES):
        torch.testing.assert_close(mixed[row], alone[adapter][row], rtol=1e-4, atol=1e-5)
    if "modules_to_save" not in settings:  # a product with other rows may round otherwise
        assert torch.equal(mixed[1], alone["__base__"][1])
    assert torch.equal(run(), alone["first"])
    for adapter in ("first", "second"):
        one = run(adapter_names=[adapter] * 5)
        torch.testing.assert_close(one, alone[adapter], rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(run(adapter_names=NAMES), alone["__base__"])


def test_gradients_reach_each_rows_inputs_through_its_adapter():
    model = three_adapters()
    ids = inputs()["input_ids"]
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()

    def run(**options):
        return torch.autograd.grad(model(inputs_embeds=embedded, **options).logits.square().sum(), embedded)[0]

    alone = by_each(model, run)
    mixed = run(adapter_names=NAMES)
    for row, adapter in enumerate(NAMES):
        torch.testing.assert_close(mixed[row], alone[adapter][row], rtol=1e-3, atol=1e-3)


def test_routing_counts_an_adapters_own_rows():
    model = three_adapters()
    with torch.no_grad():
        model(**inputs(), adapter_names=NAMES)
    mask = inputs()["attention_mask"]
    for adapter, rows, layers in (("first", [0, 3], 2), ("second", [2], 2), ("third", [4], 1)):
        found = router_statistics(model, adapter)
        assert len(found) == layers
        assert all(kept.tokens == mask[rows].sum() for kept in found.values())


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams-by-settings": {"num_beams": 3, "num_return_sequences": 2},
    "without-cache": {"use_cache": False},
}


@pytest.mark.parametrize("by_config", [False, True])
@pytest.mark.parametrize("name", GENERATION)
def test_generation(name, by_config):
    model = three_adapters(modulation="residual")
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0} | GENERATION[name]
    given = {} if by_config else settings
    if by_config:
        model.get_base_model().generation_config.update(**settings)

    def run(**options):
        return model.generate(**inputs(), **given, **options)

    alone = by_each(model, run)
    mixed = run(adapter_names=NAMES)
    each = settings.get("num_return_sequences", 1)
    length = mixed.shape[1]
    for row, adapter in enumerate(NAMES):
        rows = slice(row * each, (row + 1) * each)
        want = torch.nn.functional.pad(alone[adapter][rows], (0, max(0, length - alone[adapter].shape[1])))
        assert torch.equal(mixed[rows], want[:, :length])
    assert torch.equal(run(), alone["first"])


def test_threads_use_names_of_their_own():
    model = three_adapters(modulation="residual", train_norms=True)
    batches = [NAMES, NAMES[::-1], ["second"] * 5, None]

    @torch.no_grad()
    def run(index):
        return model(**inputs(), adapter_names=batches[index]).logits

    want = [run(index) for index in range(4)]
    interleave(model)
    for found, expected in zip(in_threads(lambda index: [run(index), run(index)], 4), want, strict=True):
        assert all(torch.equal(got, expected) for got in found)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["first", "other", "some", "first", "first"], "got other, some, want any of first, second, third, __base__"),
        (["first"] * 3, "got 3 names for 5 rows, want one for each row"),
        (["first"] * 10, "got 10 names for 5 rows, want one for each row"),
        (["__base__"], "got 1 names for 5 rows, want one for each row"),
        ("first", "got 'first', want a list with the name of an adapter for each row"),
        ([None] * 5, "got [None, None, None, None, None], want a list"),
    ],
)
def test_names_that_are_not_one_adapter_a_row(names, message):
    model = three_adapters()
    with torch.no_grad():
        want = model(**inputs()).logits
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=re.escape(f"adapter_names: {message}")):
            call(**inputs(), adapter_names=names)
    with torch.no_grad():
        assert torch.equal(model(**inputs()).logits, want)


def test_refused_in_training_and_in_a_call_past_the_peft_model():
    model = three_adapters()
    with pytest.raises(ValueError, match="adapter_names: got a value, want none"):
        model.get_base_model()(**inputs(), adapter_names=NAMES)
    with pytest.raises(ValueError, match=r"adapter_names: got names in training mode, want model\.eval\(\)"):
        model.train()(**inputs(), adapter_names=NAMES)


def test_the_adapters_of_another_method_apply_to_the_whole_batch():
    from hycam.methods import MoeLoraConfig

    model = get_peft_model(tiny_model(), MoeLoraConfig(r=2, task_type="CAUSAL_LM")).eval()
    with pytest.raises(ValueError, match="adapter_names: got a value, want none"):
        model(**inputs(), adapter_names=["default"] * 5)
    assert adapted_model().eval()(**inputs(), adapter_names=["default"] * 5).logits.shape[0] == 5


@pytest.mark.parametrize("shared", ["full", "slora", "none"])
def test_an_adapter_has_as_many_parameters_as_the_docs_say(shared):
    model = adapted_model(shared=shared)
    before = sum(parameter.numel() for parameter in model.parameters())
    model.add_adapter("other", config(shared=shared, r=4, num_experts=3))
    d, r, experts, layers = 32, 4, 3, 2
    of_shared = {"full": d * d, "slora": 2 * d * r + r * r, "none": 0}[shared]
    added = sum(parameter.numel() for parameter in model.parameters()) - before
    assert added == layers * (of_shared + experts * (2 * d * r + r * r + d))
