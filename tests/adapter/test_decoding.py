"""Generation as users run it: by whatever cache, search or batching, the tokens of the forward over the whole text."""

from collections import Counter

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Cache,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
)
from transformers.cache_utils import QuantizedLayer

from hycam import router_statistics
from tests.adapter.builders import adapted_model, batch
from tests.models import tiny_model

# Mistral's and every other layer of Gemma 2 attend to so many tokens: fewer than a prompt has.
WINDOW = 5
NEW_TOKENS = 8
PROMPTS = [[59, 89, 66, 45, 88, 6, 72], [94, 51, 35, 43], [103, 12, 101, 59, 21]]
# What makes a device wait for the host, or the host for the device.
SYNCHRONISING = {"_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "unique_consecutive"}


def model_of(family="llama", **settings):
    sizes = {"sliding_window": WINDOW} if family in ("mistral", "gemma2") else {}
    model = adapted_model(family, sizes=sizes, **settings).eval()
    model.generation_config.eos_token_id = None  # every answer has all its tokens
    return model


def padded(rows):
    """Ids and mask [rows, length], padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@torch.no_grad()
def whole_forwards(model, row, count=NEW_TOKENS):
    """The greedy continuation, the whole text going through the model for each token."""
    ids = list(row)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(row) :]


def generated(model, rows, **options):
    inputs = padded(rows)
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, **options)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("modulation", ["attention", "residual"])
def test_the_adapter_changes_the_text(modulation):
    """Else the others could not tell."""
    model = model_of(modulation=modulation)
    with model.disable_adapter():
        base = [whole_forwards(model, row) for row in PROMPTS]
    assert all(whole_forwards(model, row) != other for row, other in zip(PROMPTS, base, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
    ],
    ids=lambda options: "-".join(map(str, *options.items())),
)
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"modulation": "residual", "routing": "hard"}),
        ("mistral", {}),
        ("gemma2", {}),
    ],
    ids=["llama", "llama-residual", "mistral", "gemma2"],
)
def test_caches(family, settings, options):
    """Sliding windows among them: both dynamic and static caches keep those of Mistral's and Gemma 2's layers."""
    model = model_of(family, **settings)
    assert generated(model, PROMPTS, **options) == [whole_forwards(model, row) for row in PROMPTS]


class _Unrounded(QuantizedLayer):
    """A backend that keeps what it is given; every backend that CI could have moves the logits by its rounding."""

    def _quantize(self, tensor, axis):
        return tensor.clone()

    def _dequantize(self, quantized):
        return quantized


@pytest.mark.parametrize("modulation", ["attention", "residual"])
def test_a_quantised_cache(modulation):
    """Whose older tokens are quantised anew whenever `residual_length` newer ones have come."""
    model = model_of(modulation=modulation)
    layers = [_Unrounded(residual_length=3) for _ in range(model.config.num_hidden_layers)]
    cache = Cache(layers=layers)
    assert generated(model, PROMPTS, past_key_values=cache) == [whole_forwards(model, row) for row in PROMPTS]
    assert all(layer._quantized_keys.shape[-2] > len(PROMPTS[0]) for layer in layers)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams(cache):
    model = model_of()
    want = generated(model, PROMPTS, num_beams=3, use_cache=False)
    assert want != generated(model, PROMPTS)
    assert generated(model, PROMPTS, num_beams=3, cache_implementation=cache) == want


@pytest.mark.parametrize("assistant", ["prompt lookup", "another model", "the backbone", "the model itself"])
@pytest.mark.parametrize("modulation", ["attention", "residual"])
def test_assisted_decoding(modulation, assistant):
    model = model_of(modulation=modulation)
    options = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "another model": {"assistant_model": tiny_model(seed=7)},
        "the backbone": {"assistant_model": tiny_model()},
        "the model itself": {"assistant_model": model},
    }[assistant]
    row = PROMPTS[0] * 2
    assert generated(model, [row], **options) == [whole_forwards(model, row)]


@pytest.mark.parametrize("modulation", ["attention", "residual"])
def test_continuous_batching(modulation):
    """Requests of several lengths in one batch, over a paged cache, in the thread that transformers starts for it."""
    model = model_of(modulation=modulation)
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=32)
    results = model.generate_batch(PROMPTS, generation_config=settings, continuous_batching_config=batching)
    got = {tuple(result.prompt_ids): result.generated_tokens for result in results.values()}
    assert got == {tuple(row): whole_forwards(model, row) for row in PROMPTS}


@torch.no_grad()
def decoded(model, call, steps=3):
    """Logits of the prompts' last tokens and of `steps` more, by prefill and decoding with a static cache."""
    ids, mask = padded(PROMPTS).values()
    cache = StaticCache(config=model.config, max_cache_len=mask.shape[1] + steps)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    mask = torch.cat([mask, mask[:, -1:].expand(-1, steps)], 1)  # of the whole cache: its shape doesn't change
    logits = []
    for _ in range(steps + 1):
        output = call(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(output.logits[:, -1])
        ids, positions = logits[-1].argmax(-1, keepdim=True), positions[:, -1:] + 1
    return torch.stack(logits)


@pytest.mark.parametrize("modulation", ["attention", pytest.param("residual", marks=pytest.mark.slow)])
def test_prefill_and_decoding_are_one_graph_each(modulation):
    torch._dynamo.reset()
    model = model_of(modulation=modulation)
    want = decoded(model, model)
    counter = CompileCounterWithBackend("eager")
    torch.testing.assert_close(decoded(model, torch.compile(model, fullgraph=True, backend=counter)), want)
    assert counter.frame_count == 2


class _Counted(TorchDispatchMode):
    """Counts the operations that synchronise."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in SYNCHRONISING:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
@pytest.mark.parametrize(
    "settings",
    [{}, {"modulation": "residual", "noise": "always"}, {"routing": "hard", "experts": "full", "shared": "slora"}],
    ids=["paper", "noise", "hard"],
)
@torch.no_grad()
def test_the_adapter_synchronises_nothing(settings, cache):
    """Prefill and decoding step have the backbone's own waits for the device, and no more."""

    def counts(model):
        sizes = {"max_cache_len": 16} if cache is StaticCache else {}
        inputs, kept = padded(PROMPTS), cache(config=model.config, **sizes)
        with _Counted() as prefill:
            model(**inputs, past_key_values=kept)
        mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"][:, -1:]], 1)
        with _Counted() as step:
            model(input_ids=inputs["input_ids"][:, -1:], attention_mask=mask, past_key_values=kept)
        return prefill.counts, step.counts

    assert counts(model_of(**settings)) == counts(tiny_model())


@pytest.mark.filterwarnings("error:The tensor attributes")
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("modulation", ["attention", "residual"])
def test_export(modulation, strict):
    """Of any batch and length; the program computes what the model does, and nothing of the tracing stays in it."""
    model = model_of(modulation=modulation).get_base_model()
    example, other = (batch(5, rows, length) for rows, length in ((3, 9), (2, 12)))
    del example["labels"], other["labels"]
    shapes = {name: dict.fromkeys(range(2), torch.export.Dim.DYNAMIC) for name in example}
    with torch.no_grad():
        want = model(**other, use_cache=False).logits
        load = {name: routing.load.clone() for name, routing in router_statistics(model).items()}
        exported = torch.export.export(
            model, (), example | {"use_cache": False}, dynamic_shapes=shapes | {"use_cache": None}, strict=strict
        )
        torch.testing.assert_close(exported.module()(**other, use_cache=False).logits, want)
    for name, routing in router_statistics(model).items():
        assert torch.equal(routing.load, load[name])
