"""Rows from the hub, from local files and from the synthetic tasks, as `{instruction, input, output}`."""

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Value

from hycam.data.cache import RowCache, file_digest, in_memory
from hycam.data.config import UNIFIED_FIELDS, TaskConfig
from hycam.data.formats import KNOWN_SETS, FieldError, KnownSet, RowParser, fields_parser
from hycam.data.synthetic import synthetic_task
from hycam.errors import InputError

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_BATCH = 100
_PARQUET_BUFFER = 1 << 20  # bytes
_SYNTHETIC_PREFIX = "synthetic_"
_SYNTHETIC_ROWS = 1000
_HUB_OPTIONS = ("split", "subset", "revision")

TEXT_FEATURES = Features({field: Value("string") for field in UNIFIED_FIELDS})
_SHOWN_PLACES = 10

_PlacedRow = tuple[str, Any]  # a row with the place that an error names: `file.jsonl:12`, `file.json: row 3`


def load_task(config: TaskConfig, cache: RowCache | None = None) -> Dataset:
    """All rows of a task, in the source's order: columns `instruction`, `input`, `output` (text).

    A row whose instruction or output is blank teaches nothing: it is skipped, and a warning says how many there were
    and where. Every other flaw is an error. A `.json` file, being one value, is read as a whole; every other source
    row by row.

    Args:
        config: the task.
        cache: keeps the rows on disk, by the content of their source; None: they are in memory.

    Raises:
        InputError: for an unknown task, a source that is missing, unreadable, out of reach or empty, a broken JSON
            line, and a row that lacks a field or has the wrong type in it, with file and line (JSON lines) or row
            number (counted from 1).
    """
    source = config.source or config.name
    if source.startswith(_SYNTHETIC_PREFIX):
        return _synthetic(source, config)
    content, placed_rows = _opened(source, config)
    parse = _parser(source, config)

    def make(notes: dict[str, Any]) -> Iterator[dict[str, str]]:
        return _unified_rows(placed_rows, parse, config.max_rows, notes)

    if cache is None:
        notes: dict[str, Any] = {}
        dataset = in_memory(make(notes), TEXT_FEATURES)
    else:
        key: dict[str, Any] = {
            "rows of": content(),
            "task": dataclasses.asdict(config) | dict.fromkeys(("name", "source", "split_by", "domain")),
        }
        key["task"]["known set"] = next((name for name, known in KNOWN_SETS.items() if known.parse is parse), None)
        cached = cache.rows(key, TEXT_FEATURES, make)
        dataset, notes = cached.dataset, cached.notes
    report_blank(config, notes)
    if not len(dataset):
        raise InputError(no_rows(config, notes))
    return dataset


def stream_task(config: TaskConfig, notes: dict[str, Any]) -> Iterator[dict[str, str]]:
    """A task's rows as they are read, `{instruction, input, output}`, the rows of `load_task`; none is kept.

    Args:
        config: the task.
        notes: is given the number of blank rows met so far, `blank`, and the first ones' places, `places`.

    Raises:
        InputError: as `load_task`, but each flaw where the reading comes to it; for a `.json` file, which is read as a
            whole; for a hub set without the commit that it is read from, which each pass and a resumed run read again.
    """
    source = config.source or config.name
    if source.startswith(_SYNTHETIC_PREFIX):
        notes |= {"blank": 0, "places": []}
        yield from _synthetic(source, config)
        return
    _, placed_rows = _opened(source, config, streaming=True)
    yield from _unified_rows(placed_rows, _parser(source, config), config.max_rows, notes)


def report_blank(config: TaskConfig, notes: Mapping[str, Any]) -> None:
    """Warn of the rows that were skipped."""
    if notes["blank"]:
        shown = ", ".join(notes["places"]) + (", ..." if notes["blank"] > _SHOWN_PLACES else "")
        message = "%s: skipped rows with a blank instruction or output, %d: %s"
        logger.warning(message, config.name, notes["blank"], shown)


def no_rows(config: TaskConfig, notes: Mapping[str, Any]) -> str:
    """What an error says of a source without a row to use."""
    given = f"{notes['blank']} rows, all with a blank instruction or output" if notes["blank"] else "no rows"
    return f"{config.source or config.name}: {given}, wanted at least one row with both"


def _synthetic(source: str, config: TaskConfig) -> Dataset:
    _refuse(config, ("fields", "format", *_HUB_OPTIONS), "a synthetic task")
    return synthetic_task(source, config.max_rows or _SYNTHETIC_ROWS, seed=0)


def _unified_rows(
    rows: Iterable[_PlacedRow], parse: RowParser, max_rows: int | None, notes: dict[str, Any]
) -> Iterator[dict[str, str]]:
    """At most `max_rows` rows with instruction and output; `notes` counts the others and has the first ones' places."""
    notes |= {"blank": 0, "places": []}
    count = 0
    for place, native in rows:
        if count == max_rows:
            break
        if not isinstance(native, Mapping):
            raise InputError(f"{place}: a {type(native).__name__}, wanted an object with a field per column")
        try:
            row = dict(zip(UNIFIED_FIELDS, parse(native), strict=True))
        except FieldError as error:
            raise InputError(f"{place}: {error}") from error
        if not (row["instruction"].strip() and row["output"].strip()):
            notes["blank"] += 1
            if notes["blank"] <= _SHOWN_PLACES:
                notes["places"].append(place)
            continue
        count += 1
        yield row


def _parser(source: str, config: TaskConfig) -> RowParser:
    if config.fields is not None:
        return fields_parser(**config.fields)
    known = _known_set(source, config)
    return fields_parser("instruction", "output", input="input") if known is None else known.parse


def _known_set(source: str, config: TaskConfig) -> KnownSet | None:
    hub_names = {known.hub_id: name for name, known in KNOWN_SETS.items()}
    for name in (config.format, source, hub_names.get(source), config.name):
        if name is not None and name in KNOWN_SETS:
            return KNOWN_SETS[name]
    return None


def origin(config: TaskConfig) -> tuple[str | None, str]:
    """A task's domain, where it is known, and its source: a hub id, a file's name, or a synthetic task's."""
    source = config.source or config.name
    known = _known_set(source, config)
    domain = config.domain or (None if known is None else known.domain)
    if source in KNOWN_SETS:
        return domain, KNOWN_SETS[source].hub_id
    return domain, source if _HUB_ID.fullmatch(source) and not Path(source).suffix else Path(source).name


def _opened(
    source: str, config: TaskConfig, *, streaming: bool = False
) -> tuple[Callable[[], str], Iterator[_PlacedRow]]:
    """What finds out how the source's content differs from any other, and its rows."""
    path = Path(source).expanduser()
    kind = path.suffix.lower()
    if kind in _FILE_READERS:
        _refuse(config, _HUB_OPTIONS, "a file")
        if streaming and kind == ".json":
            raise InputError(f"{path}: a .json file is read as a whole, wanted .jsonl or .parquet with data.streaming")
        return lambda: f"{kind} {_file_content(path)}", _FILE_READERS[kind](path)
    if source in KNOWN_SETS:
        return _hub_rows(source, config, streaming)
    if path.exists():
        wanted = ", ".join(_FILE_READERS)
        raise InputError(f"tasks: {config.name}: source: {source!r}, wanted a file that ends in one of {wanted}")
    if _HUB_ID.fullmatch(source):
        return _hub_rows(source, config, streaming)
    raise InputError(
        f"tasks: {config.name}: source: unknown task {source!r}, wanted one of {', '.join(KNOWN_SETS)}, a "
        f"{_SYNTHETIC_PREFIX}* task, a hub id (owner/name) or a file that ends in {', '.join(_FILE_READERS)}"
    )


def _file_content(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _jsonl_rows(path: Path) -> Iterator[_PlacedRow]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parse_json(line.rstrip(b"\r\n"), path, first_line=number)
    except OSError as error:
        raise _unreadable(path, error) from error


def _json_rows(path: Path) -> Iterator[_PlacedRow]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    rows = _parse_json(content, path, first_line=1)
    if not isinstance(rows, list):
        raise InputError(f"{path}: a {type(rows).__name__}, wanted an array of rows (or a row a line in a .jsonl file)")
    for number, row in enumerate(rows, start=1):
        yield f"{path}: row {number}", row


def _parse_json(content: bytes, path: Path, first_line: int) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        hint = "; a file with a row a line is named .jsonl" if error.msg == "Extra data" else ""
        line = first_line + error.lineno - 1
        raise InputError(f"{path}:{line}: broken JSON, column {error.colno}: {error.msg}{hint}") from error
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise InputError(f"{path}:{line}: a byte that is not {error.encoding}, wanted UTF-8 text") from error
    except (ValueError, RecursionError) as error:  # an integer of over 4300 digits, a thousand brackets
        raise InputError(f"{path}:{first_line}: unreadable JSON: {error}") from error


def _parquet_rows(path: Path) -> Iterator[_PlacedRow]:
    number = 0
    try:
        with path.open("rb") as file:
            # else pyarrow reads row groups whole, and keeps all that it has read
            parquet = pq.ParquetFile(file, buffer_size=_PARQUET_BUFFER, pre_buffer=False)
            for batch in parquet.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except OSError as error:
        raise _unreadable(path, error) from error
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path}: after row {number}: broken parquet: {_first_line(error)}") from error


_FILE_READERS = {".json": _json_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}


def _hub_rows(source: str, config: TaskConfig, streaming: bool) -> tuple[Callable[[], str], Iterator[_PlacedRow]]:
    known = KNOWN_SETS.get(source)
    hub_id = source if known is None else known.hub_id
    revision = config.revision or (None if known is None else known.revision)
    data_files = None if known is None else known.data_files
    if streaming and not _COMMIT.fullmatch(revision or ""):
        raise InputError(
            f"tasks: {config.name}: revision: {revision!r}, wanted the commit of the hub set, 40 hexadecimal digits, "
            "with data.streaming: every pass and a resumed run read the set again"
        )
    options = {"streaming": True} if streaming else {}
    with _hub_failures(hub_id, config):
        rows = datasets.load_dataset(
            hub_id, config.subset, split=config.split, data_files=data_files, revision=revision, **options
        )
    return lambda: f"{hub_id} {rows._fingerprint}", _placed(rows, hub_id, config)


def _placed(rows: Dataset | datasets.IterableDataset, hub_id: str, config: TaskConfig) -> Iterator[_PlacedRow]:
    number = 0
    with _hub_failures(hub_id, config):
        # in batches: a stream's own iterator gives each worker of a DataLoader other rows
        for batch in rows.iter(batch_size=_HUB_BATCH):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield f"{hub_id}: row {number}", dict(zip(batch, values, strict=True))


@contextmanager
def _hub_failures(hub_id: str, config: TaskConfig) -> Iterator[None]:
    """Turns what goes wrong at the hub into an `InputError`."""
    try:
        yield
    except ConnectionError as error:
        raise InputError(
            f"tasks: {config.name}: source: hub set {hub_id!r} is out of reach (no network) and not cached here; "
            f"a downloaded copy can be given as source: a file that ends in {', '.join(_FILE_READERS)}"
        ) from error
    except Exception as error:  # the hub client, the HTTP client and the file readers each have kinds of their own
        raise InputError(
            f"tasks: {config.name}: source: hub set {hub_id!r} can't be loaded: {type(error).__name__}: "
            f"{_first_line(error)}"
        ) from error


def _refuse(config: TaskConfig, options: tuple[str, ...], kind: str) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for option in options:
        value = getattr(config, option)
        if value != defaults[option]:
            raise InputError(f"tasks: {config.name}: {option}: {value!r}, wanted none: the source is {kind}")


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: can't be read: {error.strerror or _first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
