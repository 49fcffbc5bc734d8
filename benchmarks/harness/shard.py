"""A pytest plugin (``-p benchmarks.harness.shard``): HYCAM_SHARD=i/n runs every n-th of the tests, from the i-th on.

The process ends with the one that started it.
"""

import os
import signal

import pytest

from benchmarks.harness.processes import end_with


def pytest_configure() -> None:
    """What a background job starts ignores SIGINT, which tells these processes that their time is up."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_with(os.getppid())


# after pytest's own choice by marks, so that shards of what runs are equal
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    index, count = map(int, os.environ["HYCAM_SHARD"].split("/"))
    kept = items[index::count]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
