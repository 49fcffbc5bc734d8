"""The rows of `data/`, as the scripts here use them."""

from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

DATA = Path(__file__).with_name("data")


def load_rows() -> Dataset:
    """Both tasks' rows in one set, shuffled: `prompt`, `completion`, each a text."""
    files = [str(path) for path in sorted(DATA.glob("*.csv"))]
    rows = load_dataset("csv", data_files=files, split="train").shuffle(seed=0)
    return rows.map(
        lambda row: {"prompt": f"{row['instruction']}\n", "completion": row["output"]}, remove_columns=rows.column_names
    )


def tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Token ids, and labels of the completion with its end alone."""

    def one(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}

    return rows.map(one, remove_columns=rows.column_names)
