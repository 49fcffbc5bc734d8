"""Rows one behind another in a batch: of each the logits, loss and gradients that it has alone, adapter and all."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils import is_torch_flex_attn_available

from hycam.data.collation import Collator
from hycam.errors import InputError
from hycam.training.packing import check_isolation
from tests.adapter.builders import FAMILIES, adapted_model, config, gradients, largest_error, randomise
from tests.decoders import tiny_decoder
from tests.models import tiny_model

LENGTHS = [9, 4, 21, 1, 7, 2]  # the longest is longer than the windows below, and all than the positions' half
# Model -> what makes it one of its kind: windows and chunks shorter than the longest row, and positions stretched.
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "dynamic": {"factor": 4.0},
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 24,
    },
}
KINDS: dict[str, dict[str, Any]] = {
    **{f"llama {name}": {"rope_parameters": {"rope_type": name, "rope_theta": 1e4, **ROPES[name]}} for name in ROPES},
    "mistral window": {"sliding_window": 5},
    "gemma2 window": {"sliding_window": 5},
    "qwen3 window": {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
    "llama short": {"max_position_embeddings": 24},
    "gpt2 short": {"n_positions": 24},
}


def skip_unknown(family: str, attention: str) -> None:
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("its logits' soft cap is no part of sdpa")


def token_rows(lengths=LENGTHS, seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 128, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def trained(family: str = "llama", sizes: dict[str, Any] | None = None, **settings):
    """An adapted model as the Trainer has it: without a cache."""
    model = adapted_model(family, sizes=sizes, **({"noise": "never"} | settings))
    model.config.use_cache = False
    return model


def packed_and_alone(model, rows, **options) -> tuple[list[Tensor], list[Tensor]]:
    """Each row's logits behind the others, and in a forward of its own."""
    batch = Collator(0, packing=True)(rows)
    batch.pop("labels")
    with torch.no_grad():
        together = model(**batch, **options).logits[0]
        alone = [model(input_ids=torch.tensor([row["input_ids"]]), **options).logits[0] for row in rows]
    ends = [0, *torch.tensor([len(row["input_ids"]) for row in rows]).cumsum(0).tolist()]
    return [together[start:end] for start, end in pairwise(ends)], alone


def assert_apart(model, rows=None, **options):
    packed, alone = packed_and_alone(model, token_rows() if rows is None else rows, **options)
    for got, want in zip(packed, alone, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, attention):
    skip_unknown(family, attention)
    model = trained(family, {"attn_implementation": attention}).eval()
    assert_apart(model)
    check_isolation(model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_windows_and_positions(kind, attention):
    """In a batch longer than the model's positions, too."""
    family, rows = kind.partition(" ")[0], token_rows()
    skip_unknown(family, attention)
    assert sum(LENGTHS) > 24
    assert_apart(trained(family, KINDS[kind] | {"attn_implementation": attention}).eval(), rows)
    with torch.no_grad():  # what makes the model one of its kind matters to the longest row
        ids = torch.tensor([max((row["input_ids"] for row in rows), key=len)])
        plain = tiny_model(family, attn_implementation=attention)
        other = tiny_model(family, **KINDS[kind] | {"attn_implementation": attention})
        differs = not torch.allclose(plain(ids).logits, other(ids).logits, atol=1e-3)
    assert differs or "short" in kind or kind == "llama dynamic"


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_training(family, checkpointing):
    """The loss and every gradient of the rows side by side; `checkpointing`: None without, else whether reentrant."""
    results = []
    for packing in (False, True):
        model = trained(family, balance_coef=1.0)
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        loss = model(**Collator(0, packing=packing)(token_rows())).loss
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    (want_loss, want), (loss, got) = results
    torch.testing.assert_close(loss, want_loss)
    assert largest_error(got, want) < 1e-4


def test_a_cache_mixes_rows():
    """So a model is called without one, and one that makes one all the same is refused."""
    model = trained().eval()
    packed, alone = packed_and_alone(model, token_rows(), use_cache=True)
    torch.testing.assert_close(packed[0], alone[0], rtol=1e-3, atol=1e-4)
    assert (packed[1] - alone[1]).abs().max() > 0.1
    model.config.use_cache = True
    with pytest.raises(InputError, match=r"data\.packing: got true, wanted false: LlamaForCausalLM doesn't keep"):
        check_isolation(model)


@pytest.mark.slow
@pytest.mark.skipif(not is_torch_flex_attn_available(), reason="flex attention needs a newer torch")
@pytest.mark.parametrize("window", [None, 5])
def test_flex_attention(window):
    """On a CPU it compiles for every length anew, for minutes."""
    sizes = {"num_hidden_layers": 1, "sliding_window": window, "attn_implementation": "flex_attention"}
    assert_apart(trained("mistral", sizes).eval(), token_rows([9, 9]))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_chunks(attention):
    """Rows that a chunk of the batch would cut in two."""
    from peft import get_peft_model

    model = get_peft_model(tiny_decoder("llama4_text", attention_chunk_size=8), config(noise="never")).eval()
    model.set_attn_implementation(attention)
    randomise(model)
    assert_apart(model, token_rows([5, 6, 7, 14]), use_cache=False)


def test_noise_in_evaluation_is_no_neighbour():
    check_isolation(trained(noise="always"))


def test_what_is_trained_alone_is_as_before():
    """The check leaves mode and random state as they were."""
    model = trained()
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    check_isolation(model)
    assert model.training and torch.equal(torch.rand(2), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_no_neighbour(dtype):
    check_isolation(trained(dtype=dtype))
