"""Tokenized rows and collators written here, so that these tests don't lean on the data package."""

import torch
from datasets import Dataset


def make_rows(seed: int, num_rows: int, *, longest: int = 20, vocab: int = 128) -> Dataset:
    """Rows of 4 to `longest` random tokens whose first one to three are the prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, list] = {"input_ids": [], "labels": [], "task_id": []}
    for _ in range(num_rows):
        length = int(torch.randint(4, longest + 1, (), generator=generator))
        prompt = int(torch.randint(1, 4, (), generator=generator))
        ids = torch.randint(3, vocab, (length,), generator=generator).tolist()
        rows["input_ids"].append(ids)
        rows["labels"].append([-100] * prompt + ids[prompt:])
        rows["task_id"].append(0)
    return Dataset.from_dict(rows)


def pad_right(rows: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([list(row[key]) + [filler] * (width - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def pack(rows: list[dict]) -> dict[str, torch.Tensor]:
    """All rows in one sequence. The labels keep each row's first token, to see that it is not scored."""
    return {
        "input_ids": torch.tensor([[i for row in rows for i in row["input_ids"]]]),
        "labels": torch.tensor([[i for row in rows for i in row["labels"]]]),
        "position_ids": torch.tensor([[i for row in rows for i in range(len(row["input_ids"]))]]),
    }
