"""Measurements that need models, kept as JSON beside what they were made from."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hycam.data.cache import digest
from hycam.errors import InputError
from hycam.training.callbacks import finite, write_whole


class Store:
    """A folder with a JSON file for each kind of measurement: key -> `inputs`, a SHA-256 of what it was made from, and
    `value`.

    Args:
        folder: made with the first measurement.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(
        self, kind: str, key: str, inputs: Mapping[str, Any] | None, measure: Callable[[], dict[str, Any]] | None
    ) -> dict[str, Any] | None:
        """The measurement `key` of a kind: the kept one where its inputs are these, else made and kept.

        Args:
            inputs: plain values that decide what `measure` gives; None where they aren't known: the kept measurement is
                taken as it is.
            measure: makes it; None where it can't be made.

        Returns:
            None where it is neither kept nor made.

        Raises:
            InputError: a file that holds no measurements.
        """
        kept = self.all(kind)
        if key in kept and (inputs is None or kept[key]["inputs"] == digest(inputs)):
            return kept[key]["value"]
        if inputs is None or measure is None:
            return None
        value = finite(measure())
        self.folder.mkdir(parents=True, exist_ok=True)
        # a long report that is stopped goes on where it was
        entries = kept | {key: {"inputs": digest(inputs), "value": value}}
        lines = (f"{json.dumps(name)}: {json.dumps(entry, allow_nan=False)}" for name, entry in entries.items())
        write_whole(self._file(kind), "{\n" + ",\n".join(lines) + "\n}\n")
        return value

    def all(self, kind: str) -> dict[str, dict[str, Any]]:
        """Every kept measurement of a kind, with its inputs."""
        path = self._file(kind)
        if not path.is_file():
            return {}
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            if all({"inputs", "value"} <= entry.keys() for entry in entries.values()):
                return entries
        except (ValueError, AttributeError) as error:
            raise InputError(f"{path}: no kept measurements: {error}; delete it to have them made anew") from error
        raise InputError(f"{path}: an entry lacks inputs or value; delete it to have all made anew")

    def _file(self, kind: str) -> Path:
        return self.folder / f"{kind}.json"
