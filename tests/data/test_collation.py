import pickle

import pytest
import torch

from hycam.data.collation import Collator
from hycam.errors import InputError

EOS = 2
ROWS = [
    {"input_ids": [1, 5, 6, EOS], "labels": [-100, -100, 6, EOS], "task_id": 0},
    {"input_ids": [1, 7], "labels": [1, 7], "task_id": 3},
]


def test_padding_on_the_right_hides_no_eos():
    batch = Collator(pad_token_id=EOS)(ROWS)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 5, 6, EOS], [1, 7, EOS, EOS]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "labels": [[-100, -100, 6, EOS], [1, 7, -100, -100]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_packing_of_single_rows_and_of_bins():
    rows = [*ROWS, {"input_ids": [8, 9, 8], "labels": [8, 9, 8], "position_ids": [0, 1, 0]}]
    batch = Collator(pad_token_id=0, packing=True)(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 5, 6, EOS, 1, 7, 8, 9, 8]],
        "labels": [[-100, -100, 6, EOS, -100, 7, -100, 9, 8]],
        "position_ids": [[0, 1, 2, 3, 0, 1, 0, 1, 0]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert rows[1]["labels"] == [1, 7], "the caller's rows stay as they are"


def test_tensor_rows_give_the_same_batch():
    rows = [{name: torch.tensor(value, dtype=torch.int32) for name, value in row.items()} for row in ROWS]
    for collator in (Collator(0), Collator(0, packing=True)):
        batch, expected = collator(rows), collator(ROWS)
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)
    assert rows[1]["labels"].tolist() == [1, 7]


def test_survives_a_worker_process():
    collator = Collator(3, packing=True)
    assert pickle.loads(pickle.dumps(collator)) == collator


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad_token_id": None}, "pad_token_id: None, wanted the id"),
        ({"pad_token_id": -1}, "pad_token_id: -1"),
    ],
)
def test_errors(options, message):
    with pytest.raises(InputError, match=message):
        Collator(**options)
