"""Rows on disk, memory-mapped, under the name of the content that they were made from.

Shuffling over all rows, packing them best and batches by length need rows in any order, which a stream doesn't
give, and every process of a machine shares the file's pages.
"""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features
from datasets.arrow_writer import ArrowWriter

from hycam.errors import InputError

logger = logging.getLogger(__name__)

# Part of every key: another number wherever the code makes other rows of the same content.
_VERSION = 3
_CHUNK = 1 << 20


@dataclass(frozen=True)
class CachedRows:
    """Rows of a cache file, and the notes of who made them (plain JSON values)."""

    dataset: Dataset
    notes: dict[str, Any]


class RowCache:
    """A folder of Arrow files, each with a record of its key and its SHA-256.

    A file is used only where its record has the very key that is asked for and its bytes have the record's hash.
    Anything else under its name is reported and made anew. Files appear under their names whole, so processes may
    share the folder.

    Args:
        folder: made where it is missing.

    Raises:
        InputError: where the folder can't be made.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder).expanduser()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"data.cache_dir: {self.folder} can't be made: {error.strerror}") from error

    def rows(
        self, key: Mapping[str, Any], features: Features, make: Callable[[dict[str, Any]], Iterable[Mapping[str, Any]]]
    ) -> CachedRows:
        """The rows of `key`; `make(notes)` yields them, and may fill in notes, where they aren't here."""
        full_key = json.loads(json.dumps({"version": _VERSION, "datasets": datasets.__version__, **key}))
        name = digest(full_key)
        arrow, record = self.folder / f"{name}.arrow", self.folder / f"{name}.json"
        found = self._notes(arrow, record, full_key)
        if found is None:
            found = self._write(arrow, record, full_key, features, make)
        return CachedRows(Dataset.from_file(str(arrow)), found)

    def _notes(self, arrow: Path, record: Path, key: dict[str, Any]) -> dict[str, Any] | None:
        """The notes of a file that can be trusted, None where it must be made."""
        if not arrow.exists() and not record.exists():
            return None
        try:
            values = json.loads(record.read_text(encoding="utf-8"))
            if values["key"] == key and values["sha256"] == file_digest(arrow):
                return values["notes"]
            reason = "it isn't what its record says"
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
        logger.warning("data.cache_dir: %s is not used and made anew: %s", arrow, reason)
        return None

    def _write(
        self,
        arrow: Path,
        record: Path,
        key: dict[str, Any],
        features: Features,
        make: Callable[[dict[str, Any]], Iterable[Mapping[str, Any]]],
    ) -> dict[str, Any]:
        notes: dict[str, Any] = {}
        partial = arrow.with_suffix(f".{uuid.uuid4().hex}.partial")
        try:
            with ArrowWriter(path=str(partial), features=features) as writer:
                for row in make(notes):
                    writer.write(dict(row))
                writer.finalize()
            values = {"key": key, "sha256": file_digest(partial), "notes": notes}
            partial.replace(arrow)
            partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            partial.replace(record)
        finally:
            partial.unlink(missing_ok=True)
        return notes


def in_memory(rows: Iterable[Mapping[str, Any]], features: Features) -> Dataset:
    columns: dict[str, list[Any]] = {name: [] for name in features}
    for row in rows:
        for name, column in columns.items():
            column.append(row[name])
    return Dataset.from_dict(columns, features=features)


def digest(value: Any) -> str:
    """SHA-256 of a plain JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def rows_digest(dataset: Dataset) -> str:
    """SHA-256 of text rows, in their order."""
    found = hashlib.sha256()
    for row in dataset:
        assert isinstance(row, dict)
        found.update(json.dumps([row["instruction"], row["input"], row["output"]]).encode())
    return found.hexdigest()
