"""Every causal LM that transformers ships, on a tiny configuration: what HyCAM does with it by default."""

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.harness.pages import fill
from hycam import router_statistics
from hycam.adapter.discovery import self_attention_names
from hycam.errors import InputError
from hycam.training.packing import check_isolation
from tests.adapter.builders import batch, config, gradients, largest_error, layers_of, plain_loss, randomise
from tests.adapter.outcomes import COUNTS, FOUND, MIXED, PAGE, RECURRENT, REFUSED, REFUSED_LATE, UNBUILT, by_type, table
from tests.adapter.test_packed import LENGTHS, packed_and_alone, token_rows
from tests.decoders import MODEL_TYPES, tiny_decoder, tiny_decoder_config

QUICK = [
    "deepseek_v3",
    "gemma3",
    "gemma3_text",
    "glm4",
    "gpt_oss",
    "kimi_linear",
    "lfm2_moe",
    "llama4_text",
    "longcat_flash",
    "ministral",
    "ministral3",
    "olmo3",
    "phi4_multimodal",
    "qwen3_moe",
    "smollm3",
]
NAMES, REASONS, MIXING = by_type(FOUND), by_type(REFUSED), by_type(MIXED)
newest = pytest.mark.skipif(
    not transformers.__version__.startswith("5.24."), reason="the types are those of transformers 5.24"
)
each_that_works = pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(NAMES)]
)


def adapted(model_type, **settings):
    torch.manual_seed(1)
    model = get_peft_model(tiny_decoder(model_type), config(**settings), autocast_adapter_dtype=False)
    randomise(model)
    return model


@pytest.fixture(autouse=True)
def _a_type_that_this_transformers_has(request):
    model_type = request.node.callspec.params["model_type"] if hasattr(request.node, "callspec") else None
    if model_type is not None and model_type not in MODEL_TYPES:
        pytest.skip("transformers got it later")


@torch.no_grad()
def logits(model):
    """Of a frozen model, without gradients: torch.matmul rounds otherwise where one is needed."""
    return model(**batch()).logits


@newest
def test_each_type_has_one_outcome():
    assert sorted([*NAMES, *REASONS, *REFUSED_LATE, *UNBUILT]) == MODEL_TYPES
    assert set(QUICK) <= set(NAMES)


@newest
def test_the_docs_say_what_is_tested():
    page = PAGE.read_text()
    assert page == fill(page, table), "draw the tables again: python -m tests.adapter.outcomes"


@pytest.mark.parametrize("model_type", [*NAMES, *REASONS])
def test_the_rule(model_type):
    """On the meta device, where nothing can run."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_decoder_config(model_type))
    if model_type in REASONS:
        with pytest.raises(ValueError, match=rf"^target_modules: got none for .*: .*{REASONS[model_type]}"):
            get_peft_model(model, config())
        assert not layers_of(model), "a refused model is left as it was"
        return
    assert self_attention_names(model) == set(NAMES[model_type].split())
    adapted_model = get_peft_model(model, config())
    text = model.config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or ["attention"] * text.num_hidden_layers
    attentions = sum(not kind.startswith(("linear", "conv")) for kind in kinds)
    assert len(layers_of(adapted_model)) == COUNTS.get(model_type, attentions)
    assert self_attention_names(model) == set(NAMES[model_type].split()), "the same for a second adapter"


@pytest.mark.parametrize("model_type", UNBUILT)
def test_what_does_not_run_without_hycam(model_type):
    with pytest.raises(Exception, match=UNBUILT[model_type]):
        logits(tiny_decoder(model_type))


@each_that_works
def test_start_and_saved_adapter(model_type, tmp_path):
    base = tiny_decoder(model_type).requires_grad_(False)
    want = logits(base)
    model = get_peft_model(base, config()).eval()
    assert torch.equal(logits(model), want)
    randomise(model)
    assert not torch.allclose(logits(model), want)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_decoder(model_type), tmp_path)
    assert loaded.peft_config["default"].target_modules == set(NAMES[model_type].split())
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("model_type", REFUSED_LATE)
def test_what_only_the_first_forward_refuses(model_type):
    with pytest.raises(ValueError, match=REFUSED_LATE[model_type]):
        logits(get_peft_model(tiny_decoder(model_type), config()))


@each_that_works
def test_what_is_modulated_is_a_projection_of_heads(model_type):
    """The output projection's result, and not yet a sum with the residual stream."""
    if model_type == "jetmoe":
        pytest.skip("its output projection is a mixture of experts")
    model, last = tiny_decoder(model_type), {}
    layers = layers_of(get_peft_model(model, config()))
    for name, layer in layers.items():
        for inner in layer.base_layer.modules():
            if isinstance(inner, nn.Linear | transformers.pytorch_utils.Conv1D):
                inner.register_forward_hook(lambda _, args, out, name=name: last.__setitem__(name, out))
        layer.base_layer.register_forward_hook(
            lambda _, args, out, name=name: torch.testing.assert_close(out[0].flatten(), last.pop(name).flatten())
        )
    model(**batch())
    assert not last


@each_that_works
def test_training(model_type):
    """Gradients of every parameter, the balance loss's as a plain loop has them, and padding left out."""
    if model_type in RECURRENT:
        pytest.skip("its layers run several times in a forward, and each time adds a balance loss")
    results = []
    for coef in (0.0, 10.0):
        model, inputs = adapted(model_type, noise="never", balance_coef=coef).train(), batch()
        loss = model(**inputs).loss if coef else plain_loss(model, inputs, coef=10.0)
        loss.backward()
        results.append(gradients(model))
        for routing in router_statistics(model).values():
            assert routing.tokens == inputs["attention_mask"].sum()
    want, got = results
    assert all(gradient.any() for gradient in got.values())
    assert largest_error(got, want) < 1e-3


@each_that_works
def test_generation_with_a_cache(model_type):
    """The same text as without one, where that is so for the bare model."""

    def generate(model, use_cache):
        ids = torch.randint(3, 128, (2, 6), generator=torch.Generator().manual_seed(3))
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "use_cache": use_cache}
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    model = adapted(model_type).eval()
    with model.disable_adapter():
        want = generate(model, False)
        if not torch.equal(generate(model, True), want):
            pytest.skip("the bare model's text depends on its cache")
    assert torch.equal(generate(model, True), generate(model, False))


@each_that_works
def test_packed_rows(model_type):
    """Of each the logits that it has alone, or `data.packing` is refused."""
    model = adapted(model_type, noise="never").eval()
    text = model.config.get_text_config()
    text.use_cache = False
    try:
        check_isolation(model)
        is_refused = False
    except InputError as error:
        assert str(error).startswith("data.packing: got true, wanted false: ")
        is_refused = True
    if transformers.__version__.startswith("5.24."):
        assert is_refused == (model_type in MIXING)
    # where fewer tokens are attended to than there are, those with equal scores are chosen by their place
    lengths = [4, 2, 3, 1, 4] if hasattr(text, "index_topk") else LENGTHS
    packed, alone = packed_and_alone(model, token_rows(lengths))
    pairs = zip(packed, alone, strict=True)
    is_apart = all(torch.allclose(got, want, rtol=1e-3, atol=1e-3) for got, want in pairs)
    # the convolutions of a tiny lfm2 are so weak that its rows are nearly apart
    assert is_apart != is_refused or model_type in ("lfm2", "lfm2_moe")
