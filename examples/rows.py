"""The rows of `data/`, as the scripts here use them."""

from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

DATA = Path(__file__).with_name("data")


def load_rows() -> Dataset:
    """Both tasks' rows in one set, shuffled: `prompt`, `completion`, each a list of one chat message."""
    files = [str(path) for path in sorted(DATA.glob("*.csv"))]
    rows = load_dataset("csv", data_files=files, split="train").shuffle(seed=0)
    return rows.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        },
        remove_columns=rows.column_names,
    )


def tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Token ids by the tokenizer's chat template, and labels of the completion with its end alone."""

    def one(row: dict[str, list[dict[str, str]]]) -> dict[str, list[int]]:
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}

    return rows.map(one, remove_columns=rows.column_names)
