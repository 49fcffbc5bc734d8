"""The YAML files that recipes are: where they lie, and how they are read, changed and compared."""

import importlib.resources
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hycam.errors import InputError
from hycam.training.schema import suggest


def packaged_yaml(*folders: str) -> dict[str, Path]:
    """Name -> file of the YAML files in a folder of the package."""
    folder = importlib.resources.files("hycam").joinpath(*folders)
    return {Path(str(file)).stem: Path(str(file)) for file in folder.iterdir() if file.name.endswith(".yaml")}


def find_yaml(name_or_path: str, inside: str, packaged: Mapping[str, Path]) -> Path:
    """The file at a path, the one called `inside` of the folder there, or the packaged one of that name."""
    path = Path(name_or_path).expanduser()
    if path.is_dir() and (path / inside).is_file():
        return path / inside
    if path.is_file():
        return path
    if name_or_path in packaged:
        return packaged[name_or_path]
    if path.is_dir():
        hint = "; --adapter takes the folder of an adapter" if (path / "adapter_config.json").is_file() else ""
        raise InputError(f"{name_or_path}: the folder has no {inside}{hint}")
    if path.suffix or len(path.parts) > 1:
        raise InputError(f"{name_or_path}: no such recipe file")
    raise InputError(f"{name_or_path}: neither a recipe file nor one that ships{suggest(name_or_path, packaged)}")


def set_field(values: dict[str, Any], name: str, value: Any) -> None:
    """Set a dotted field, which the command line gave, in nested mappings and lists; missing mappings are made.

    A key may have dots itself: of several that `name` could mean, the longest that is there.
    """
    node: Any = values
    path: list[str] = []
    key, rest = _first_key(node, name)
    while rest is not None:
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = _child(node, key, name, ".".join(path))
        path.append(key)
        key, rest = _first_key(node, rest)
    if isinstance(node, dict):
        node[key] = value
    else:
        _child(node, key, name, ".".join(path))
        node[int(key)] = value


def _first_key(node: Any, name: str) -> tuple[str, str | None]:
    """The key of `node` that a dotted name begins with, and what follows it: None where nothing does."""
    keys = node.keys() if isinstance(node, dict) else ()
    meant = [key for key in keys if isinstance(key, str) and f"{name}.".startswith(f"{key}.")]
    key = max(meant, key=len) if meant else name.partition(".")[0]
    return key, None if key == name else name.removeprefix(f"{key}.")


def _child(node: Any, key: str, name: str, path: str) -> Any:
    if isinstance(node, dict):
        return node[key]
    if not isinstance(node, list):
        raise InputError(f"--{name}: {path!r} is {node!r}, which has no fields")
    if not key.isdecimal() or int(key) >= len(node):
        raise InputError(f"--{name}: {path!r} is a list of {len(node)}, wanted an index instead of {key!r}")
    return node[int(key)]


class _RecipeLoader(yaml.SafeLoader):
    """Safe YAML in which `2e-5` is a number (YAML 1.1 wants a dot) and a key may not come twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} comes twice", problem_mark=key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """Safe YAML. Raises `InputError` with `source` and the line."""
    try:
        return yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{source}{line}: not YAML: {problem}") from error


def read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read: {error}") from error
    return parse_yaml(text, str(path))


def differing_fields(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted names of the fields in which two plain recipes differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            name
            for key in keys
            for name in differing_fields(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [name for index, (a, b) in pairs for name in differing_fields(a, b, f"{path}.{index}")]
    return [] if old == new else [path]
