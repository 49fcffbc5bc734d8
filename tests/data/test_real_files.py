"""The real files, named by the environment variable HYCAM_DATA; skipped where it is unset."""

import os
from pathlib import Path

import pytest

from hycam.data.config import DataConfig, TaskConfig
from hycam.data.packing import pack_dataset
from hycam.data.sources import load_task
from hycam.data.splits import split_dataset
from hycam.data.tokenization import tokenize_dataset
from tests.data.tokenizers import byte_tokenizer

FOLDER = os.environ.get("HYCAM_DATA")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="HYCAM_DATA names no folder with the real files")

# file, known set, rows in the file, rows with a blank instruction or output
FILES = [
    ("auto_cot.json", "auto_cot", 5526, 0),
    ("dolly.jsonl", "dolly", 14265, 0),
    ("code_alpaca.json", "code_alpaca", 6225, 2),
    ("icliniq.json", "icliniq", 442, 0),
    ("medical_qa_standin.json", "icliniq", 5396, 0),
    ("webgpt_standin.jsonl", "webgpt", 1853, 0),
]


@pytest.mark.parametrize(("file", "known_set", "rows", "blank"), FILES)
def test_every_row_is_read(file, known_set, rows, blank):
    dataset = load_task(TaskConfig(Path(file).stem, str(Path(FOLDER, file)), format=known_set))
    assert len(dataset) == rows - blank
    assert all(text.strip() for column in ("instruction", "output") for text in dataset[column][:])
    for fold in range(5):
        parts = split_dataset(dataset, fold)
        shares = [len(parts[part]) / len(dataset) for part in ("train", "validation", "test")]
        assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.05)


@pytest.mark.parametrize(("file", "known_set"), [row[:2] for row in FILES])
def test_rows_become_packed_tokens(file, known_set):
    config = TaskConfig(Path(file).stem, str(Path(FOLDER, file)), format=known_set, max_rows=400)
    task = tokenize_dataset(load_task(config), byte_tokenizer(adds="bos"), DataConfig(max_length=1200), task_id=0)
    assert len(task.dataset) + task.dropped == 400
    packed = pack_dataset(task.dataset, 1200)
    assert sum(map(len, packed["input_ids"])) == sum(map(len, task.dataset["input_ids"]))
