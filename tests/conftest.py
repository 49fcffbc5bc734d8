import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    """Each test draws from the same generator state, whatever ran before it."""
    torch.manual_seed(0)
