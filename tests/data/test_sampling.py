"""The order of training rows, and the tasks' shares."""

import pytest
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from datasets import Dataset
from torch.utils.data import BatchSampler

from hycam.data.sampling import EpochSampler, mix_tasks


def _task(name: str, rows: int) -> Dataset:
    return Dataset.from_dict({"task": [name] * rows, "row": list(range(rows))})


@pytest.mark.parametrize("lengths", [None, [3 + 7 * row % 11 for row in range(24)]])
def test_an_epochs_order_follows_from_seed_and_epoch(lengths: list[int] | None) -> None:
    epoch = 0
    sampler = EpochSampler(24, 5, lambda: epoch, lengths, group_size=4)
    first = list(sampler)
    assert sorted(first) == list(range(24))
    assert list(sampler) == first
    epoch = 1
    second = list(sampler)
    assert sorted(second) == list(range(24))
    assert second != first
    assert list(EpochSampler(24, 5, lambda: 1, lengths, group_size=4)) == second
    assert list(EpochSampler(24, 6, lambda: 1, lengths, group_size=4)) != second


def test_rows_of_similar_length_share_a_step() -> None:
    lengths = [1 + row * 37 % 64 for row in range(64)]

    def padding(sampler: EpochSampler) -> int:
        rows = list(sampler)
        groups = [[lengths[row] for row in rows[start : start + 8]] for start in range(0, 64, 8)]
        return sum(max(group) * len(group) - sum(group) for group in groups)

    assert padding(EpochSampler(64, 0, lambda: 0, lengths, 8)) < 0.6 * padding(EpochSampler(64, 0, lambda: 0))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_step_takes_the_same_rows_on_any_number_of_processes(processes: int) -> None:
    """At the same rows per step; in the middle of an epoch that a resume skips into, too."""

    def steps(skipped: int) -> list[list[int]]:
        batches = BatchSampler(EpochSampler(32, 3, lambda: 2), 8 // processes, drop_last=False)
        shards = [
            list(SkipBatchSampler(BatchSamplerShard(batches, processes, rank), skipped)) for rank in range(processes)
        ]
        return [[row for part in parts for row in part] for parts in zip(*shards, strict=True)]

    order = list(EpochSampler(32, 3, lambda: 2))
    assert steps(0) == [order[start : start + 8] for start in range(0, 32, 8)]
    assert steps(2) == steps(0)[2:]


def test_temperature_1_takes_every_row_once() -> None:
    mixed = mix_tasks([_task("a", 5), _task("b", 3)], 1.0, 0)
    assert mixed["task"][:] == ["a"] * 5 + ["b"] * 3


def test_temperature_sets_the_tasks_shares() -> None:
    tasks = [_task("a", 1600), _task("b", 100)]
    mixed = mix_tasks(tasks, 2.0, 0)
    rows = set(zip(mixed["task"], mixed["row"], strict=True))
    assert len(rows) == 1700
    # shares 40 : 10; the standard deviation of 2,000 draws is 0.9 %
    assert mixed["task"][:].count("b") / len(mixed) == pytest.approx(0.2, abs=0.03)
    assert mix_tasks(tasks, 2.0, 0).to_dict() == mixed.to_dict()
    assert mix_tasks(tasks, 2.0, 1).to_dict() != mixed.to_dict()
    even = mix_tasks(tasks, 1e6, 0)["task"][:]
    assert even.count("b") / len(even) == pytest.approx(0.5, abs=0.03)


def test_no_seed_repeats_the_orders_of_the_one_before():
    orders = {
        (seed, epoch): tuple(EpochSampler(50, seed, lambda epoch=epoch: epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == len(orders)
