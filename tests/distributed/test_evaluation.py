"""Two processes part the rows that they evaluate, and both have the whole result."""

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import WORLD_SIZE, log_of, run_jobs


def test_the_processes_part_the_rows(tmp_path: Path) -> None:
    # a last round that is full, one with a short batch, one with a batch for the first process alone; one row
    row_counts = {"full": 4, "short": 3, "odd": 5, "one": 1}
    job = {"job": "evaluate", "row_counts": row_counts, "batch_size": 2}
    assert run_jobs(tmp_path, [job]) == [0, 0], "\n".join(log_of(tmp_path, rank) for rank in range(WORLD_SIZE))
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(WORLD_SIZE)]
    alone, parted = ranks[0]["found"]["False"], ranks[0]["found"]["True"]
    assert ranks[1]["found"] == ranks[0]["found"]
    for got, want in [(parted["overall"], alone["overall"])] + [
        (parted["tasks"][name], alone["tasks"][name]) for name in row_counts
    ]:
        assert got["tokens"] == want["tokens"]
        assert got["nll"] == pytest.approx(want["nll"], rel=1e-6)
    # as many forwards each, of its own rows; the second repeats the first's where it has none
    assert ranks[0]["forwards"] == [2, 2, 2, 1, 1]
    assert ranks[1]["forwards"] == [2, 1, 2, 1, 1]
    assert all(rank["progress"] == [4, 3, 4, 1, 1] for rank in ranks)
