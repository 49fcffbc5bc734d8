"""From token rows to a batch of model inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hycam.data.tokenization import IGNORED_LABEL
from hycam.errors import InputError


@dataclass(frozen=True)
class Collator:
    """Makes model inputs of rows with `input_ids` and `labels`; other columns, such as `task_id`, stay behind.

    Without packing: `input_ids`, `attention_mask`, `labels`, int64 [batch, longest row], padded on the right. The mask
    follows from the rows' lengths, so a pad token that is also the eos token hides no eos. Padding has label -100.

    With packing: the rows one after another in `input_ids`, `labels`, `position_ids`, int64 [1, all tokens]. Positions
    restart with every row (from the rows' `position_ids` where `pack_dataset` made them), a row's first label is -100.
    There is no attention mask: transformers reads the borders from the positions, but only without a key-value cache.
    So call the model with `use_cache=False` (`Trainer` does so), else rows attend to those before them.

    Attributes:
        pad_token_id: the id that fills short rows; masked in attention and loss.
        packing: concatenate instead of padding.

    Raises:
        InputError: for a pad token id that is no id.
    """

    pad_token_id: int
    packing: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.pad_token_id, bool) or not isinstance(self.pad_token_id, int) or self.pad_token_id < 0:
            raise InputError(f"pad_token_id: {self.pad_token_id!r}, wanted the id of the tokenizer's pad token")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return self._packed(rows) if self.packing else self._padded(rows)

    def _padded(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), width)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED_LABEL),
        }
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][i, :length] = torch.as_tensor(row["input_ids"])
            batch["attention_mask"][i, :length] = 1
            batch["labels"][i, :length] = torch.as_tensor(row["labels"])
        return batch

    def _packed(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        positions = [torch.as_tensor(row.get("position_ids", range(len(row["input_ids"])))) for row in rows]
        labels = [torch.as_tensor(row["labels"]).clone() for row in rows]
        for row_labels in labels:
            row_labels[0] = IGNORED_LABEL
        return {
            "input_ids": torch.cat([torch.as_tensor(row["input_ids"]) for row in rows]).long()[None],
            "labels": torch.cat(labels).long()[None],
            "position_ids": torch.cat(positions).long()[None],
        }
