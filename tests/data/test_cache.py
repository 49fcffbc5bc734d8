"""Rows and tokens on disk: used again for the same content, never trusted blindly, and out of the process's memory."""

import json

import pytest
from datasets import Dataset, Features, Value

from hycam.data.cache import RowCache
from hycam.data.config import DataConfig, TaskConfig
from hycam.data.packing import pack_dataset
from hycam.data.sources import load_task
from hycam.data.tokenization import tokenize_dataset
from hycam.errors import InputError
from tests.data.memory import last_number, needs_proc
from tests.training.runs import rows, save_rows, save_tokenizer

FEATURES = Features({"number": Value("int64")})


class Source:
    """Counts how often its rows are made."""

    def __init__(self, *numbers):
        self.numbers, self.calls = numbers, 0

    def __call__(self, notes):
        self.calls += 1
        notes["count"] = len(self.numbers)
        for number in self.numbers:
            yield {"number": number}


def read(cache, source, **key):
    found = cache.rows(key or {"of": "numbers"}, FEATURES, source)
    return found.dataset["number"][:], found.notes


def test_rows_are_made_once_per_key(tmp_path):
    source = Source(1, 2, 3)
    for _ in range(2):  # the second cache is another run's
        assert read(RowCache(tmp_path / "cache"), source) == ([1, 2, 3], {"count": 3})
    assert source.calls == 1
    assert read(RowCache(tmp_path / "cache"), Source(4), of="others") == ([4], {"count": 1})


def _cut(arrow, record):
    arrow.write_bytes(arrow.read_bytes()[:-8])


def _changed_byte(arrow, record):
    content = bytearray(arrow.read_bytes())
    content[len(content) // 2] ^= 1
    arrow.write_bytes(content)


def _foreign_rows(arrow, record):
    other = RowCache(arrow.parent / "other")
    other.rows({"of": "others"}, FEATURES, Source(9))
    for path in other.folder.iterdir():
        path.replace(arrow if path.suffix == ".arrow" else record)


def _no_record(arrow, record):
    record.unlink()


def _broken_record(arrow, record):
    record.write_text(record.read_text()[:-5])


def _no_rows(arrow, record):
    arrow.unlink()


@pytest.mark.parametrize("damage", [_cut, _changed_byte, _foreign_rows, _no_record, _broken_record, _no_rows])
def test_damaged_or_foreign_files_are_reported_and_made_anew(tmp_path, caplog, damage):
    cache, source = RowCache(tmp_path), Source(1, 2, 3)
    read(cache, source)
    (arrow,) = tmp_path.glob("*.arrow")
    damage(arrow, arrow.with_suffix(".json"))
    caplog.clear()
    assert read(cache, source) == ([1, 2, 3], {"count": 3})
    assert source.calls == 2
    assert f"{arrow} is not used and made anew" in caplog.text
    assert read(cache, source) == ([1, 2, 3], {"count": 3})
    assert source.calls == 2


def test_an_error_leaves_nothing_behind(tmp_path):
    def failing(notes):
        yield {"number": 1}
        raise InputError("row 2 is broken")

    with pytest.raises(InputError, match="row 2 is broken"):
        read(RowCache(tmp_path), failing)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"data.cache_dir: .*file/cache can't be made"):
        RowCache(tmp_path / "file" / "cache")


def test_a_task_is_read_again_only_when_its_content_differs(tmp_path, caplog):
    cache = RowCache(tmp_path / "cache")
    values = [*rows(20), {"instruction": " ", "input": "", "output": "x"}]
    path = save_rows(tmp_path / "rows.jsonl", values)
    plain = load_task(TaskConfig("mine", source=str(path)))
    assert plain.to_list() == rows(20)
    for _ in range(2):
        caplog.clear()
        assert load_task(TaskConfig("mine", source=str(path)), cache).to_list() == rows(20)
        assert "skipped rows with a blank instruction or output, 1" in caplog.text
    moved = path.rename(tmp_path / "moved.jsonl")
    load_task(TaskConfig("other", source=str(moved)), cache)
    assert len(list(cache.folder.glob("*.arrow"))) == 1
    assert load_task(TaskConfig("mine", source=str(moved), max_rows=5), cache).to_list() == rows(5)
    swapped = TaskConfig("mine", source=str(moved), fields={"instruction": "output", "output": "instruction"})
    assert load_task(swapped, cache)[0]["output"] == rows(1)[0]["instruction"]
    save_rows(moved, rows(20, offset=1))
    assert load_task(TaskConfig("mine", source=str(moved)), cache).to_list() == rows(20, offset=1)
    assert len(list(cache.folder.glob("*.arrow"))) == 4


def test_tokens_follow_rows_tokenizer_and_settings(tmp_path):
    cache = RowCache(tmp_path / "cache")
    dataset = Dataset.from_list(rows(30))
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    config = DataConfig(max_length=34, prompt="chat")
    plain = tokenize_dataset(dataset, tokenizer, config, 2)

    def cached(dataset=dataset, tokenizer=tokenizer, config=config, task_id=2):
        return tokenize_dataset(dataset, tokenizer, config, task_id, cache)

    def files():
        return len(list(cache.folder.glob("*.arrow")))

    for _ in range(2):
        found = cached()
        assert found.dataset.to_list() == plain.dataset.to_list()
        assert (found.truncated, found.dropped) == (plain.truncated, plain.dropped)
    assert files() == 1
    cached(config=DataConfig(max_length=34, prompt="chat", fold=3))  # the rows say which fold they are
    assert files() == 1
    cached(config=DataConfig(max_length=35, prompt="chat"))
    cached(config=DataConfig(max_length=34, prompt="chat", train_on_prompt=True))
    cached(task_id=3)
    cached(dataset=Dataset.from_list(rows(30, offset=1)))
    assert files() == 5
    tokenizer.eos_token = "<pad>"
    assert cached().dataset[0]["input_ids"][-1] == tokenizer.pad_token_id
    tokenizer.chat_template = tokenizer.chat_template.replace(": ", " = ")
    cached()
    assert files() == 7


def test_bins_from_disk_are_those_in_memory(tmp_path):
    cache = RowCache(tmp_path / "cache")
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    tokens = tokenize_dataset(
        Dataset.from_list(rows(30)), tokenizer, DataConfig(max_length=128, prompt="chat"), 0
    ).dataset
    for _ in range(2):
        assert pack_dataset(tokens, 200, cache).to_list() == pack_dataset(tokens, 200).to_list()
    assert len(list(cache.folder.glob("*.arrow"))) == 1


_MEMORY = """
import sys, threading
from transformers import AutoTokenizer
from hycam.data.config import DataConfig, TaskConfig
from hycam.training.tasks import load_rows, tokenize_split, training_set
from tests.data.memory import anonymous

def run(source, cache):
    config = DataConfig(max_length=356, cache_dir=cache)
    rows = load_rows([TaskConfig("big", source=source)], config)
    tokens = {split: tokenize_split(rows, split, tokenizer, config) for split in ("train", "validation", "test")}
    return rows, tokens, training_set(tokens["train"], config, seed=0)

folder, cached = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
run(f"{folder}/small.jsonl", f"{folder}/small" if cached == "True" else None)
before = peak = anonymous()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.02):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
kept = run(f"{folder}/large.jsonl", f"{folder}/large" if cached == "True" else None)
assert len(kept[0]["big"].splits["all"]) == 50_000
done.set()
thread.join()
print("grown", peak - before)
"""


@pytest.mark.slow
@needs_proc
def test_memory_does_not_grow_with_the_data(tmp_path):
    save_tokenizer(tmp_path)
    with (tmp_path / "large.jsonl").open("w") as large, (tmp_path / "small.jsonl").open("w") as small:
        for number, row in enumerate(rows(50_000)):
            line = json.dumps(row | {"output": f"{row['output']} " * 12}) + "\n"
            large.write(line)
            if number < 2000:
                small.write(line)
    size = (tmp_path / "large.jsonl").stat().st_size
    assert size > 14e6
    growth = last_number(_MEMORY, str(tmp_path), "True")
    # the split's row numbers and the buffers of one writer
    assert growth < 24e6
    # what the same rows take without a cache
    assert last_number(_MEMORY, str(tmp_path), "False") > 4 * max(growth, 1)
