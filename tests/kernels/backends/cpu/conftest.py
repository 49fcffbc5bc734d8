import os
import shutil
from collections.abc import Callable

import pytest

from hycam_kernels.backends.cpu import library

if (why := library.refusal()) and not shutil.which(os.environ.get("CXX", "c++")):
    # with a compiler the library must be there
    collect_ignore_glob = ["test_*.py"]
    print(f"tests of the native passes left out: {why}")


@pytest.fixture
def choose(monkeypatch) -> Callable[[str], None]:
    """Sets the environment variable, as a process that starts with it would have found it."""

    def set_variable(value: str) -> None:
        monkeypatch.setenv(library.VARIABLE, value)
        library._load.cache_clear()

    yield set_variable
    library._load.cache_clear()


@pytest.fixture(params=library.VECTOR_SETS)
def vectors(request, choose) -> str:
    """Each of the vector sets that the processor has, chosen."""
    choose(request.param)
    if why := library.refusal():
        pytest.skip(why)
    return request.param
