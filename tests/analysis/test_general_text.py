import math

import pytest
import torch

from hycam.analysis.general_text import text_perplexity, text_windows
from hycam.data.documents import read_documents
from hycam.errors import InputError
from tests.models import tiny_model
from tests.training.runs import save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_windows_hold_every_token_once(tokenizer):
    texts = ["the cat 1 is red", "x", "an owl 22 is green, a fox is blue"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert len(ids[1]) == 1
    windows = text_windows(texts, tokenizer, 4)
    assert all(2 <= len(row) <= 4 for row in windows["input_ids"])
    kept = [token for row in windows["input_ids"] for token in row]
    cut = [row[: len(row) - (len(row) % 4 == 1)] for row in ids]  # a last window of one token has no target
    assert kept == [token for row in cut for token in row]
    assert windows["labels"] == windows["input_ids"]


def test_the_perplexity_is_that_of_each_window_by_itself(tokenizer):
    """Against a sum over one window at a time, each token given those before it in its window."""
    model = tiny_model(vocab_size=320)
    windows = text_windows(["the cat 1 is red", "an owl 22 is green, a fox is blue"], tokenizer, 5)
    nll, tokens = 0.0, 0
    with torch.no_grad():
        for ids in windows["input_ids"]:
            logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            nll -= sum(logits[i, ids[i + 1]].item() for i in range(len(ids) - 1))
            tokens += len(ids) - 1
    for batch_size in (1, 8):
        result = text_perplexity(model, windows, tokenizer.pad_token_id, batch_size=batch_size)
        assert result["tokens"] == tokens
        assert result["nll"] == pytest.approx(nll, rel=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)


def test_no_target(tokenizer):
    with pytest.raises(InputError, match="texts: 1 given without one of two tokens"):
        text_windows(["x"], tokenizer, 4)
    with pytest.raises(InputError, match="max_length: 1 given"):
        text_windows(["x y z"], tokenizer, 1)


def test_documents(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two", "id": 3}\n{"text": "three"}\n')
    assert read_documents(path) == ["one", "two", "three"]
    assert read_documents(path, 2) == ["one", "two"]
    path.write_text("")
    with pytest.raises(InputError, match=r"text\.jsonl: no line"):
        read_documents(path)
