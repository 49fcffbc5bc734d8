"""Streams of training rows: which rows, in which order, for any number of workers and processes; how far they read."""

import dataclasses
import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader

import hycam.data.streaming as module
from hycam.data.collation import Collator
from hycam.data.config import DataConfig, StreamingConfig, TaskConfig
from hycam.data.sources import load_task
from hycam.data.splits import split_dataset
from hycam.data.streaming import StreamCollator, StreamedRows, read_held_out
from hycam.data.tokenization import tokenize_dataset
from hycam.errors import InputError
from tests.data.memory import last_number, needs_proc
from tests.data.tokenizers import byte_tokenizer

COMMIT = "0123456789abcdef" * 2 + "01234567"
TOKENIZER = byte_tokenizer(adds="bos")


def text_rows(count: int, word: str = "colour") -> list[dict[str, str]]:
    return [{"instruction": f"{word} {n}?", "input": "", "output": f"It is {n * n}."} for n in range(count)]


def task(folder: Path, name: str, count: int, **fields: Any) -> TaskConfig:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in text_rows(count, name)))
    return TaskConfig(name, str(path), **fields)


def config(*, fold: int = 0, **streaming: Any) -> DataConfig:
    return DataConfig(fold=fold, streaming=StreamingConfig(**streaming))


def stream(tasks: list[TaskConfig], data: DataConfig, *, seed: int = 3, group_size: int = 4) -> StreamedRows:
    return StreamedRows(tasks, data, seed, group_size)


def taken(rows: Any, count: int) -> list[str]:
    return [row["instruction"] for row in itertools.islice(rows, count)]


def loaded(rows: Any, count: int, *, workers: int) -> list[dict[str, str]]:
    """As a DataLoader with batches of 4 gives them."""
    batches = DataLoader(rows, batch_size=4, num_workers=workers, collate_fn=list)
    return [row for batch in itertools.islice(batches, count // 4) for row in batch]


def train_rows(config: TaskConfig, fold: int = 0) -> list[dict[str, str]]:
    """What training without streaming takes of a task."""
    return split_dataset(load_task(config), fold)["train"].to_list()


def test_a_pass_has_every_training_row_once_in_an_order_of_its_own(tmp_path):
    source, data = task(tmp_path, "colours", 150), config(shuffle_buffer=20, fold=2)
    want = train_rows(source, 2)
    rows = list(itertools.islice(stream([source], data), 3 * len(want)))
    passes = [rows[start : start + len(want)] for start in range(0, len(rows), len(want))]
    for one in passes:
        assert sorted(map(str, one)) == sorted(map(str, want))
    assert passes[0] != passes[1] != passes[2] != passes[0] != want
    assert list(itertools.islice(stream([source], data), 3 * len(want))) == rows
    assert list(itertools.islice(stream([source], data, seed=4), 3 * len(want))) != rows


def test_a_buffer_of_one_keeps_the_sources_order(tmp_path):
    source, data = task(tmp_path, "colours", 60), config(shuffle_buffer=1)
    want = train_rows(source)
    assert list(itertools.islice(stream([source], data), 2 * len(want))) == 2 * want


def test_a_row_is_drawn_from_the_buffer(tmp_path):
    """What comes n-th was among the first n + buffer rows, and waited for a time of chance."""
    source = task(tmp_path, "colours", 400)
    want = train_rows(source)
    place = {row["instruction"]: n for n, row in enumerate(want)}

    def moves(buffer: int) -> list[int]:
        rows = taken(stream([source], config(shuffle_buffer=buffer)), len(want))
        return [place[row] - n for n, row in enumerate(rows)]

    within = moves(50)
    assert max(within) <= 50
    assert len(set(within)) > 80  # a draw that is none gives all rows but the last ones the same
    # of the first 50 rows, each stays until the end with a chance of 1 %
    assert sum(n < len(want) - 50 for n, move in enumerate(within) if n + move < 50) >= 40
    # a buffer that holds all rows: the mean way of a row in a permutation is a third of them, give or take 2 %
    whole = moves(1000)
    assert sum(map(abs, whole)) / len(whole) == pytest.approx(len(want) / 3, rel=0.15)


@pytest.mark.parametrize("weights", [None, {"animals": 3.0}])
def test_weights_are_the_tasks_shares(tmp_path, weights):
    tasks = [task(tmp_path, "colours", 900), task(tmp_path, "animals", 60)]
    of_animals = {row["instruction"] for row in train_rows(tasks[1])}
    rows = taken(stream(tasks, config(weights=weights)), 2000)
    # the standard deviation of 2,000 draws is at most 1.1 %
    assert sum(row in of_animals for row in rows) / 2000 == pytest.approx(0.75 if weights else 0.5, abs=0.04)


def test_a_tasks_rows_do_not_depend_on_the_other_tasks(tmp_path):
    tasks = [task(tmp_path, "colours", 90), task(tmp_path, "animals", 60)]
    alone = taken(stream(tasks[:1], config()), 100)
    mixed = taken(stream(tasks, config()), 400)
    assert [row for row in mixed if row in set(alone)][:100] == alone


def test_equal_rows_of_two_tasks_come_in_orders_of_their_own(tmp_path):
    one = task(tmp_path, "colours", 90)
    other = dataclasses.replace(one, name="animals")
    orders = [taken(stream([source], config()), 60) for source in (one, other)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_order_is_the_same_for_any_number_of_workers(tmp_path, workers):
    tasks = [task(tmp_path, "colours", 90), task(tmp_path, "animals", 60)]
    rows = stream(tasks, config(shuffle_buffer=16), group_size=4)
    assert loaded(rows, 120, workers=workers) == list(itertools.islice(rows, 120))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_passed_over_is_empty(tmp_path, workers):
    rows = stream([task(tmp_path, "colours", 90)], config())
    want = loaded(rows, 80, workers=workers)
    rows.skipped = 52
    assert loaded(rows, 80, workers=workers) == 52 * [{}] + want[52:]


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_take_the_groups_in_turn(tmp_path, workers):
    rows = stream([task(tmp_path, "colours", 150)], config(), group_size=6)
    shards = [
        itertools.islice(
            DataLoader(
                IterableDatasetShard(rows, batch_size=2, num_processes=3, process_index=rank),
                batch_size=2,
                num_workers=workers,
                collate_fn=list,
            ),
            20,
        )
        for rank in range(3)
    ]
    got = [row for parts in zip(*shards, strict=True) for part in parts for row in part]
    assert got == list(itertools.islice(rows, 120))


@pytest.mark.parametrize("max_length", [1200, 47])  # which some rows are longer than
@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_is_that_of_tokenized_rows(tmp_path, packing, max_length):
    data = DataConfig(max_length=max_length, packing=packing, streaming=StreamingConfig())
    rows = list(itertools.islice(stream([task(tmp_path, "colours", 60)], data), 6))
    tokens = tokenize_dataset(datasets.Dataset.from_list(rows), TOKENIZER, data, task_id=0).dataset
    want = Collator(TOKENIZER.pad_token_id, packing=packing)(tokens.to_list())
    got = StreamCollator(TOKENIZER, data)(rows)
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name])


@pytest.mark.parametrize("packing", [False, True])
def test_rows_without_room_are_left_out_of_a_batch(packing):
    """Of a batch without any other, a token stays that is no target."""
    short, long = text_rows(2)
    long["instruction"] *= 100
    data = DataConfig(max_length=300, packing=packing, streaming=StreamingConfig())
    collate = StreamCollator(TOKENIZER, data)
    for name, value in collate([short, long]).items():
        assert torch.equal(value, collate([short])[name])
    alone = collate([long, long])
    assert alone["input_ids"].tolist() == [[TOKENIZER.eos_token_id]]
    assert alone["labels"].tolist() == [[-100]]


def test_nothing_is_made_of_rows_that_are_passed_over():
    assert StreamCollator(TOKENIZER, config())([{}, {}]) == {}


def test_held_out_rows_are_the_first_of_their_parts_and_never_trained_on(tmp_path):
    source = task(tmp_path, "colours", 400)
    parts = split_dataset(load_task(source), 1)
    held_out = read_held_out(source, 1, 12)
    assert {part: rows.to_list() for part, rows in held_out.items()} == {
        part: parts[part].to_list()[:12] for part in ("validation", "test")
    }
    everything = read_held_out(source, 1, 10_000)
    assert {part: rows.to_list() for part, rows in everything.items()} == {
        part: parts[part].to_list() for part in ("validation", "test")
    }


@pytest.mark.parametrize("split_by", ["instruction", "prompt"])
def test_a_question_of_several_inputs_is_parted_as_without_streaming(tmp_path, split_by):
    """As WebGPT's: one question, each time with other quotes and another answer."""
    rows = [
        {"instruction": f"Why is {n}?", "input": f"quote {n}.{i}", "output": f"answer {n}.{i}"}
        for n in range(80)
        for i in range(3)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = TaskConfig("asked", str(path), split_by=split_by)
    parts = split_dataset(load_task(source), 0, split_by)
    held_out = read_held_out(source, 0, 1000)
    assert all(held_out[part].to_list() == parts[part].to_list() for part in ("validation", "test"))
    trained = list(itertools.islice(stream([source], config(shuffle_buffer=1)), len(parts["train"])))
    assert trained == parts["train"].to_list()
    asked = {row["instruction"] for row in trained} & set(held_out["test"]["instruction"])
    assert bool(asked) == (split_by == "prompt")


def test_rows_to_train_on_may_come_last(tmp_path):
    source = task(tmp_path, "colours", 400)
    parts = split_dataset(load_task(source), 0)
    rows = [*parts["validation"], *parts["test"], *parts["train"]]
    Path(source.source).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [len(part) for part in read_held_out(source, 0, 5).values()] == [5, 5]


def test_only_what_is_needed_is_read(tmp_path, monkeypatch):
    source = task(tmp_path, "colours", 4000)
    places = []
    read = module.stream_task

    def counted(*args):
        for row in read(*args):
            places.append(row["instruction"])
            yield row

    monkeypatch.setattr(module, "stream_task", counted)
    held_out = read_held_out(source, 0, 20)
    assert [len(rows) for rows in held_out.values()] == [20, 20]
    assert len(places) < 400  # 200 rows have 20 test rows among them, on average
    places.clear()
    next(iter(stream([source], config(shuffle_buffer=100))))
    assert len(places) < 200  # 7 of 10 rows are trained on


def test_every_kind_of_source_gives_the_rows_of_load_task(tmp_path):
    jsonl = task(tmp_path, "colours", 40, max_rows=25)
    parquet = TaskConfig("colours", str(tmp_path / "rows.parquet"), max_rows=25)
    pq.write_table(pa.Table.from_pylist(text_rows(40, "colours")), parquet.source)
    synthetic = TaskConfig("synthetic_code", max_rows=30)
    for source in (jsonl, parquet, synthetic):
        notes: dict[str, Any] = {}
        assert list(module.stream_task(source, notes)) == load_task(source).to_list()
        assert notes["blank"] == 0


def hub(monkeypatch, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A hub whose sets stream `rows` from two shards."""
    calls = []

    def load(path, subset, **options):
        calls.append(options)
        return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


@pytest.mark.parametrize("workers", [0, 2])
def test_a_hub_set_is_streamed_and_every_worker_reads_all_of_it(monkeypatch, workers):
    calls = hub(monkeypatch, text_rows(80))
    source, data = TaskConfig("mine", "owner/set", revision=COMMIT), config()
    rows = stream([source], data)
    got = loaded(rows, 80, workers=workers)
    assert got == list(itertools.islice(rows, 80))
    assert calls[0] == {"split": "train", "data_files": None, "revision": COMMIT, "streaming": True}
    once = len({str(row) for row in got})
    assert max(Counter(map(str, got)).values()) - 80 // once <= 1


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:7]])
def test_a_hub_set_needs_its_commit(monkeypatch, revision):
    assert not hub(monkeypatch, [])
    with pytest.raises(InputError, match=rf"^tasks: mine: revision: {revision!r}, wanted the commit .* 40 hexadecimal"):
        read_held_out(TaskConfig("mine", "owner/set", revision=revision), 0, 10)


def test_a_hub_that_fails_while_it_is_read_is_named(monkeypatch):
    def rows():
        yield from text_rows(1)
        raise OSError("the line is cut\nsomewhere")

    stream_of_one = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: stream_of_one)
    with pytest.raises(InputError, match=r"'owner/set' can't be loaded: OSError: the line is cut$"):
        read_held_out(TaskConfig("mine", "owner/set", revision=COMMIT), 0, 10)


def test_a_json_file_is_refused(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(text_rows(40)))
    with pytest.raises(InputError, match=r"rows.json: a .json file is read as a whole, wanted .jsonl or .parquet"):
        read_held_out(TaskConfig("mine", str(path)), 0, 10)


def test_a_flaw_is_named_where_the_reading_comes_to_it(tmp_path):
    source = task(tmp_path, "colours", 150)
    want = train_rows(source)
    with Path(source.source).open("a") as file:
        file.write('{"instruction": 3}\n')
    assert len(read_held_out(source, 0, 3)["test"]) == 3
    got = []
    with pytest.raises(InputError, match=r"colours.jsonl:151: "):
        for row in stream([source], config(shuffle_buffer=1)):
            got.append(row)
    assert got == want[:-1]


def test_blank_rows_are_skipped_and_told(tmp_path, caplog):
    source = task(tmp_path, "colours", 80)
    with Path(source.source).open("a") as file:
        file.write(json.dumps({"instruction": "colour?", "input": "", "output": " "}) + "\n")
    read_held_out(source, 0, 1000)
    assert "colours: skipped rows with a blank instruction or output, 1: " in caplog.text
    assert "colours.jsonl:81" in caplog.text


def test_a_source_without_a_row_for_a_part_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^tasks: colours: fold 0: no row of 3 falls to the \w+ part, wanted more"):
        read_held_out(task(tmp_path, "colours", 3), 0, 10)
    with pytest.raises(InputError, match=r"colours.jsonl: no rows, wanted at least one row with both$"):
        read_held_out(task(tmp_path, "colours", 0), 0, 10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shuffle_buffer": 0}, "shuffle_buffer: 0, wanted an integer of 1 or more"),
        ({"held_out_rows": 1.5}, "held_out_rows: 1.5, wanted an integer of 1 or more"),
        ({"weights": ["a"]}, r"weights: \['a'\], wanted a mapping"),
        ({"weights": {2024: 1.0}}, "weights: 2024, wanted a task's name, in quotes"),
        ({"weights": {"a": 1e308}}, "weights: a: 1e.308, wanted a number above 0, at most 1e.06"),
        ({"weights": {"a": 0}}, "weights: a: 0, wanted a number above 0"),
        ({"weights": {"a": True}}, "weights: a: True, wanted a number above 0"),
        ({"weights": {"a": float("inf")}}, "weights: a: inf, wanted a number above 0"),
    ],
)
def test_wrong_settings(fields, message):
    with pytest.raises(InputError, match=f"^{message}"):
        StreamingConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 2.0}, "temperature: 2.0, wanted 1 with streaming"),
        ({"cache_dir": "rows"}, "cache_dir: 'rows', wanted null with streaming"),
    ],
)
def test_what_streaming_excludes(fields, message):
    with pytest.raises(InputError, match=f"^{message}"):
        DataConfig(streaming=StreamingConfig(), **fields)


_MEMORY = """
import itertools, sys
from tests.data.memory import anonymous
from tests.data.test_streaming import TaskConfig, config, read_held_out, stream

def run(path, count):
    task = TaskConfig("big", path)
    read_held_out(task, 0, 100)
    before = peak = anonymous()
    rows = stream([task], config(shuffle_buffer=1000))
    for number, _ in enumerate(itertools.islice(rows, count)):
        if number % 100 == 0:
            peak = max(peak, anonymous())
    return peak - before

run(sys.argv[1], 3000)
print("grown", run(sys.argv[2], 60_000))
"""


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize(("kind", "allowed"), [("jsonl", 5e6), ("parquet", 60e6)])
def test_memory_does_not_grow_with_the_data(tmp_path, kind, allowed):
    """A Parquet file is decoded by pages and columns, here of one row group."""
    large, small = (tmp_path / f"{size}.{kind}" for size in ("large", "small"))
    noise = random.Random(0)
    for path, count in ((large, 80_000), (small, 3000)):
        rows = [row | {"output": row["output"] + noise.randbytes(750).hex()} for row in text_rows(count)]
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=count, compression="none")
    assert large.stat().st_size > 120e6
    assert last_number(_MEMORY, str(small), str(large)) < allowed
