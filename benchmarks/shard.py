"""A pytest plugin (``-p benchmarks.shard``): with HYCAM_SHARD=i/n it runs every n-th of the tests, from the i-th on."""

import os

import pytest


# after pytest's own choice by marks, so that shards of what runs are equal
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    index, count = map(int, os.environ["HYCAM_SHARD"].split("/"))
    kept = items[index::count]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
