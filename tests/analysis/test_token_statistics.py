import numpy as np
import pytest
from datasets import Dataset

from hycam.analysis.token_statistics import token_statistics
from hycam.data.config import DataConfig
from hycam.data.prompts import prompt_text
from tests.training.runs import rows, save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("style", ["alpaca", "chat"])
def test_lengths_are_those_of_the_texts(tokenizer, style):
    values = rows(30)
    values[4]["output"] = "very " * 20 + "long"
    prompts = [len(tokenizer(prompt_text(row, style, tokenizer))["input_ids"]) for row in values]
    responses = [len(tokenizer(row["output"])["input_ids"]) + 1 for row in values]
    report = token_statistics(Dataset.from_list(values), tokenizer, DataConfig(max_length=1000, prompt=style))
    for part, lengths in (("prompt", prompts), ("response", responses)):
        want = {"mean": np.mean(lengths), "p50": np.percentile(lengths, 50), "p95": np.percentile(lengths, 95)}
        assert report[part] == pytest.approx(want | {"max": max(lengths)})
    assert (report["rows"], report["truncated"], report["dropped"]) == (30, 0, 0)
    assert report["response"]["max"] > 2 * report["response"]["p95"]


def test_what_the_longest_length_does_and_that_the_lengths_are_before_it(tokenizer):
    """By row: truncated where prompt and response exceed it, dropped where no token of a response is left."""
    values = rows(40)
    values[7]["input"] = "a very long context " * 9
    dataset, whole = Dataset.from_list(values), DataConfig(max_length=500, prompt="chat")
    prompts = [len(tokenizer(prompt_text(row, "chat", tokenizer))["input_ids"]) for row in values]
    responses = [len(tokenizer(row["output"])["input_ids"]) + 1 for row in values]
    limit = sorted(map(sum, zip(prompts, responses, strict=True)))[20]
    dropped = sum(limit - prompt <= 1 for prompt in prompts)
    truncated = sum(limit - p > 1 and p + r > limit for p, r in zip(prompts, responses, strict=True))
    assert dropped == 1 and truncated > 3
    report = token_statistics(dataset, tokenizer, DataConfig(max_length=limit, prompt="chat", train_on_prompt=True))
    assert (report["truncated"], report["dropped"]) == (truncated, dropped)
    uncut = token_statistics(dataset, tokenizer, whole)
    assert report["prompt"] == uncut["prompt"] and report["response"] == uncut["response"]
