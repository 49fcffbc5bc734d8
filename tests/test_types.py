"""What users import says its types: to a type checker the packages are typed, and no signature of the API is silent."""

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
API = re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)


def named(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def functions(value: object) -> Iterator[Callable]:
    """A function, or the public methods that a class defines, with those that make it."""
    if inspect.isfunction(value):
        yield value
    for name, member in vars(value).items() if inspect.isclass(value) else ():
        member = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", member))
        if inspect.isfunction(member) and (not name.startswith("_") or name == "__init__"):
            yield member


def silent(function: Callable) -> list[str]:
    """What its signature leaves out, but for self and cls."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    if "." in function.__qualname__.rpartition("<locals>.")[2]:
        parameters = parameters[1:] if parameters and parameters[0].name in ("self", "cls") else parameters
    missing = [parameter.name for parameter in parameters if parameter.annotation is parameter.empty]
    return missing + (["return"] if signature.return_annotation is signature.empty else [])


@pytest.mark.parametrize("path", API)
def test_every_signature_is_whole(path):
    found = list(functions(named(path)))
    assert found or inspect.isclass(named(path))
    assert {function.__qualname__: silent(function) for function in found if silent(function)} == {}


def test_a_silent_signature_is_found():
    class Half:
        def __init__(self, width: int) -> None: ...

        def method(self, x, y: int): ...

    assert [silent(function) for function in functions(Half)] == [[], ["x", "return"]]


@pytest.mark.parametrize("package", ["hycam", "hycam_kernels"])
def test_the_packages_say_that_they_are_typed(package):
    assert (ROOT / package / "py.typed").is_file()
