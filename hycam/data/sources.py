"""Rows from the hub, from local files and from the synthetic tasks, as `{instruction, input, output}`."""

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Value

from hycam.data.cache import RowCache, in_memory
from hycam.data.config import UNIFIED_FIELDS, TaskConfig
from hycam.data.files import READERS, PlacedRow, file_content, kind_of
from hycam.data.formats import KNOWN_SETS, FieldError, KnownSet, RowParser, fields_parser, parse_unified
from hycam.data.synthetic import synthetic_task
from hycam.errors import InputError

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_BATCH = 100
_SYNTHETIC_PREFIX = "synthetic_"
_SYNTHETIC_ROWS = 1000
_HUB_OPTIONS = ("split", "subset", "revision")

TEXT_FEATURES = Features({field: Value("string") for field in UNIFIED_FIELDS})
_SHOWN_PLACES = 10


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
    rows: Iterable[PlacedRow], parse: RowParser, max_rows: int | None, notes: dict[str, Any]
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
    return parse_unified if known is None else known.parse


def _known_set(source: str, config: TaskConfig) -> KnownSet | None:
    hub_names = {known.hub_id: name for name, known in KNOWN_SETS.items()}
    for name in (config.format, source, hub_names.get(source), config.name):
        if name is not None and name in KNOWN_SETS:
            return KNOWN_SETS[name]
    return None


def _columns(source: str, config: TaskConfig) -> set[str]:
    """The columns that a task's rows are parsed from; of a dotted path the name of the whole, and its beginning."""
    if config.fields is not None:
        paths = set(config.fields.values())
    else:
        known = _known_set(source, config)
        paths = set(UNIFIED_FIELDS if known is None else known.fields)
    return {path.partition(".")[0] for path in paths}


def is_source(name: str) -> bool:
    """Whether a task's name alone says where its rows are: a known or synthetic set, a hub id, or a file."""
    is_known = name in KNOWN_SETS or name.startswith(_SYNTHETIC_PREFIX)
    return is_known or kind_of(Path(name)) is not None or _HUB_ID.fullmatch(name) is not None


def origin(config: TaskConfig) -> tuple[str | None, str]:
    """A task's domain, where it is known, and its source: a hub id, a file's name, or a synthetic task's."""
    source = config.source or config.name
    known = _known_set(source, config)
    domain = config.domain or (None if known is None else known.domain)
    if source in KNOWN_SETS:
        return domain, KNOWN_SETS[source].hub_id
    return domain, source if _HUB_ID.fullmatch(source) and kind_of(Path(source)) is None else Path(source).name


def _opened(
    source: str, config: TaskConfig, *, streaming: bool = False
) -> tuple[Callable[[], str], Iterator[PlacedRow]]:
    """What finds out how the source's content differs from any other, and its rows."""
    path = Path(source).expanduser()
    kind = kind_of(path)
    if kind is not None:
        _refuse(config, _HUB_OPTIONS, "a file")
        if streaming and kind == ".json":
            raise InputError(f"{path}: a .json file is read as a whole, wanted .jsonl or .parquet with data.streaming")
        return lambda: f"{kind} {file_content(path)}", READERS[kind](path, _columns(source, config))
    if source in KNOWN_SETS:
        return _hub_rows(source, config, streaming)
    if path.exists():
        wanted = ", ".join(READERS)
        raise InputError(f"tasks: {config.name}: source: {source!r}, wanted a file that ends in one of {wanted}")
    if _HUB_ID.fullmatch(source):
        return _hub_rows(source, config, streaming)
    raise InputError(
        f"tasks: {config.name}: source: unknown task {source!r}, wanted one of {', '.join(KNOWN_SETS)}, a "
        f"{_SYNTHETIC_PREFIX}* task, a hub id (owner/name) or a file that ends in {', '.join(READERS)}"
    )


def _hub_rows(source: str, config: TaskConfig, streaming: bool) -> tuple[Callable[[], str], Iterator[PlacedRow]]:
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


def _placed(rows: Dataset | datasets.IterableDataset, hub_id: str, config: TaskConfig) -> Iterator[PlacedRow]:
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
            f"a downloaded copy can be given as source: a file that ends in {', '.join(READERS)}"
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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
