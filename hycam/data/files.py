"""Rows of local files, each with its place: JSON, JSON lines, Parquet, CSV and TSV, compressed ones too.

A reader takes the columns that are needed, None for all: what else a file holds may be of types that nothing reads.
"""

import io
import json
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from hycam.data.cache import file_digest
from hycam.errors import InputError

PlacedRow = tuple[str, Any]  # a row with the place that an error names: `file.jsonl:12`, `file.json: row 3`
Columns = Collection[str] | None
Reader = Callable[[Path, Columns], Iterator[PlacedRow]]

_PARQUET_BUFFER = 1 << 20  # bytes
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def kind_of(path: Path) -> str | None:
    """The ending by which a file's reader is known, None for a file that nothing here reads."""
    name = path.name.lower()
    return next((kind for kind in sorted(READERS, key=len, reverse=True) if name.endswith(kind)), None)


def file_content(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises `InputError` where it can't be read."""
    try:
        return file_digest(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _jsonl_rows(path: Path, columns: Columns) -> Iterator[PlacedRow]:
    try:
        with _decompressed(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parse_json(line.rstrip(b"\r\n"), path, first_line=number)
    except OSError as error:
        raise _unreadable(path, error) from error


def _json_rows(path: Path, columns: Columns) -> Iterator[PlacedRow]:
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


def _parquet_rows(path: Path, columns: Columns) -> Iterator[PlacedRow]:
    number = 0
    try:
        with path.open("rb") as file:
            # else pyarrow reads row groups whole, and keeps all that it has read
            parquet = pq.ParquetFile(file, buffer_size=_PARQUET_BUFFER, pre_buffer=False)
            for batch in parquet.iter_batches(batch_size=1000, columns=_present(columns, parquet.schema_arrow.names)):
                of_json = [field for field in batch.schema if str(pa.json_()) in str(field.type)]
                for row in batch.to_pylist():
                    row |= {field.name: _parsed(row[field.name], field.type) for field in of_json}
                    number += 1
                    yield f"{path}: row {number}", row
    except OSError as error:
        raise _unreadable(path, error) from error
    except (pa.ArrowException, UnicodeDecodeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: after row {number}: broken parquet: {_first_line(error)}") from error


def _parsed(value: Any, kind: pa.DataType) -> Any:
    """A Parquet value in which texts of the logical type JSON are the values that they hold."""
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if pa.types.is_struct(kind):
        return {field.name: _parsed(value[field.name], field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_parsed(entry, kind.value_type) for entry in value]
    return value


def _separated_rows(path: Path, columns: Columns, *, delimiter: str) -> Iterator[PlacedRow]:
    """Rows of a file whose first line names its columns, every value as the text that it is."""
    parse = pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    number = 0
    try:
        with _decompressed(path) as file:
            names = pa_csv.open_csv(file, parse_options=parse).schema.names
        convert = pa_csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            strings_can_be_null=False,
            include_columns=_present(columns, names),
        )
        with _decompressed(path) as file:
            for batch in pa_csv.open_csv(file, parse_options=parse, convert_options=convert):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except OSError as error:
        raise _unreadable(path, error) from error
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path}: after row {number}: broken table: {_first_line(error)}") from error


def _present(columns: Columns, names: list[str]) -> list[str] | None:
    """The columns to read; all where one is missing, so that the error for it names what there is."""
    if columns is None or not set(columns) <= set(names):
        return None
    return [name for name in names if name in columns]


def _decompressed(path: Path) -> io.BufferedReader:
    compression = _COMPRESSIONS.get(path.suffix.lower())
    stream: Any = path.open("rb") if compression is None else pa.CompressedInputStream(path.open("rb"), compression)
    return io.BufferedReader(stream)


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: can't be read: {error.strerror or _first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


_CSV: Reader = partial(_separated_rows, delimiter=",")
_TSV: Reader = partial(_separated_rows, delimiter="\t")
# The order is that of messages. Parquet is compressed within, and JSON is read whole.
READERS: dict[str, Reader] = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
    ".csv": _CSV,
    ".tsv": _TSV,
    **{f".jsonl{packed}": _jsonl_rows for packed in _COMPRESSIONS},
    **{f".csv{packed}": _CSV for packed in _COMPRESSIONS},
    **{f".tsv{packed}": _TSV for packed in _COMPRESSIONS},
}
