"""Strict reading of plain YAML values into dataclasses, with errors that name the file and the dotted field."""

import dataclasses
import difflib
import enum
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

from hycam.errors import InputError


def suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known name, or the list of the known ones."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


@dataclasses.dataclass(frozen=True)
class Reader:
    """Turns the values of one recipe into typed ones.

    Attributes:
        source: the file that the values come from, for messages.
        overridden: dotted fields that came from the command line instead.
    """

    source: str
    overridden: Collection[str] = ()

    def fail(self, path: str, message: str) -> NoReturn:
        """Raise `InputError` for the dotted field `path`."""
        if any(path == name or path.startswith(f"{name}.") for name in self.overridden):
            raise InputError(f"--{path}: {message}")
        raise InputError(f"{self.source}: {path}: {message}" if path else f"{self.source}: {message}")

    def mapping(self, value: Any, path: str, known: Collection[str]) -> dict[str, Any]:
        """`value` as a mapping that holds no key outside `known`."""
        if not isinstance(value, Mapping):
            self.fail(path, f"got {value!r}, wanted a mapping of fields")
        for key in value:
            if key not in known:
                self.fail(_join(path, key), f"unknown field{suggest(str(key), known)}")
        return dict(value)

    def fields(self, value: Any, hints: Mapping[str, Any], path: str) -> dict[str, Any]:
        """The mapping `value` with every entry converted to the type that `hints` gives its key."""
        entries = self.mapping(value, path, hints)
        return {key: self.convert(entry, hints[key], _join(path, key)) for key, entry in entries.items()}

    def build(self, cls: type, value: Any, path: str = "") -> Any:
        """An instance of the dataclass `cls` from the mapping `value`."""
        hints = typing.get_type_hints(cls)
        initial = [field for field in dataclasses.fields(cls) if field.init]
        values = self.fields(value, {field.name: hints[field.name] for field in initial}, path)
        for field in initial:
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and field.name not in values:
                self.fail(_join(path, field.name), "missing")
        try:
            return cls(**values)
        except ValueError as error:
            self.refuse(path, error, hints)

    def refuse(self, path: str, error: Exception, known: Collection[str]) -> NoReturn:
        """`fail` for what the section `path` said of its own values, mostly as `field: what was given, ...`."""
        message = str(error).removeprefix(f"{path.partition('.')[0]}: ")
        field, colon, rest = message.partition(": ")
        if colon and field in known:
            self.fail(_join(path, field), rest)
        self.fail(path, message)

    def convert(self, value: Any, hint: Any, path: str) -> Any:
        """`value` checked against the annotation `hint`; an int is taken where a float is wanted."""
        if _is_union(hint):
            return self._convert_union(value, typing.get_args(hint), path)
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if hint is Any:
            return value
        if origin is typing.Literal:
            if value in arguments and type(value) in {type(argument) for argument in arguments}:
                return value
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return self.build(hint, value, path)
        elif origin in (list, tuple) or hint in (list, tuple):
            if isinstance(value, list):
                item = arguments[0] if arguments else Any
                return [self.convert(entry, item, _join(path, index)) for index, entry in enumerate(value)]
        elif origin in (dict, Mapping) or hint is dict:
            if isinstance(value, Mapping):
                item = arguments[1] if arguments else Any
                return {key: self.convert(entry, item, _join(path, key)) for key, entry in value.items()}
        elif isinstance(hint, type) and issubclass(hint, enum.Enum):
            if value is False and "no" in [member.value for member in hint]:
                return "no"  # which YAML reads as false
            if value in [member.value for member in hint]:
                return value
        elif hint is float and type(value) in (int, float):
            if not math.isfinite(value):
                self.fail(path, f"got {value}, wanted a finite number")
            return float(value)
        elif isinstance(hint, type) and type(value) is hint:
            return value
        self.fail(path, f"got {_shown(value)}, wanted {_described(hint)}")

    def _convert_union(self, value: Any, options: tuple[Any, ...], path: str) -> Any:
        if value is None and types.NoneType in options:
            return None
        # a field that takes an enumeration or its spelling takes no other string
        enums = [option for option in options if isinstance(option, type) and issubclass(option, enum.Enum)]
        if enums and (isinstance(value, str) or value is False):
            return self.convert(value, enums[0], path)
        sections = [option for option in options if dataclasses.is_dataclass(option)]
        if sections and isinstance(value, Mapping):
            return self.convert(value, sections[0], path)
        for option in options:
            try:
                return self.convert(value, option, path)
            except InputError:
                continue
        wanted = " or ".join(_described(option) for option in options)
        self.fail(path, f"got {_shown(value)}, wanted {wanted}")


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:60]}... ({type(value).__name__})" if len(text) > 60 else f"{text} ({type(value).__name__})"


def _described(hint: Any) -> str:
    if hint is types.NoneType:
        return "null"
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(str(argument) for argument in typing.get_args(hint))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return " | ".join(str(member.value) for member in hint)
    if dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict:
        return "a mapping of fields"
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)
