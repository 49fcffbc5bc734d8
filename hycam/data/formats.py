"""From a set's native fields to `{instruction, input, output}`.

A parser takes one native row and returns the three texts; it raises `FieldError` for a row that it can't read.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

UnifiedRow = tuple[str, str, str]
RowParser = Callable[[Mapping[str, Any]], UnifiedRow]

# `[1]`, `[2, 3]`, `[4-6]`, `[3a]`, with the blanks before them
_CITATION_MARK = re.compile(r"[ \t]*\[\d+[a-z]?(?:\s*[,\u2013-]\s*\d+[a-z]?)*\]")


class FieldError(ValueError):
    """A field that is missing or has the wrong type: `field: what was given, what is wanted`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")


@dataclass(frozen=True)
class KnownSet:
    """One of the paper's data sets: its place on the hub, its native fields, their parser and its domain."""

    hub_id: str
    fields: tuple[str, ...]
    parse: RowParser
    domain: str
    data_files: str | None = None
    revision: str | None = None


def fields_parser(instruction: str, output: str, input: str | None = None) -> RowParser:
    """The parser for rows whose three texts stand in fields of their own, named by dotted paths.

    `input` may be null in a row (it has none), `instruction` and `output` may not. `input=None`: no row has any.
    """

    def parse(row: Mapping[str, Any]) -> UnifiedRow:
        context = "" if input is None or _lookup(row, input) is None else _text(row, input)
        return _text(row, instruction), context, _text(row, output)

    return parse


def parse_unified(row: Mapping[str, Any]) -> UnifiedRow:
    """A row of the unified names. Without `input` it has none, unless another field may be what is missed."""
    has_input = "input" in row or not row.keys() <= {"instruction", "output"}
    return fields_parser("instruction", "output", input="input" if has_input else None)(row)


def parse_webgpt(row: Mapping[str, Any]) -> UnifiedRow:
    """A WebGPT comparison: the question, the preferred answer's quotes, the preferred answer without citation marks.

    Answer 0 is preferred where `score_0 >= score_1`. A quote is its page's title and its extract on the next line;
    quotes are apart by a blank line.
    """
    preferred = 0 if _number(row, "score_0") >= _number(row, "score_1") else 1
    answer = _CITATION_MARK.sub("", _text(row, f"answer_{preferred}")).strip()
    return _text(row, "question.full_text"), _quotes(row, f"quotes_{preferred}"), answer


KNOWN_SETS: Mapping[str, KnownSet] = {
    "auto_cot": KnownSet(
        "QingyiSi/Alpaca-CoT",
        ("instruction", "input", "output"),
        fields_parser("instruction", "output", input="input"),
        "reasoning",
        data_files="Auto-CoT/Auto-CoT.json",
    ),
    "icliniq": KnownSet(
        "lavita/ChatDoctor-iCliniq",
        ("input", "answer_icliniq"),
        fields_parser("input", "answer_icliniq"),
        "medical",
    ),
    "dolly": KnownSet(
        "databricks/databricks-dolly-15k",
        ("instruction", "context", "response"),
        fields_parser("instruction", "response", input="context"),
        "general",
    ),
    "code_alpaca": KnownSet(
        "sahil2801/CodeAlpaca-20k",
        ("instruction", "input", "output"),
        fields_parser("instruction", "output", input="input"),
        "code",
    ),
    # Its main branch holds a loading script, which `datasets` no longer runs: the hub's own parquet copy is data alone.
    "webgpt": KnownSet(
        "openai/webgpt_comparisons",
        ("question", *(f"{name}_{number}" for name in ("answer", "score", "quotes") for number in (0, 1))),
        parse_webgpt,
        "long-form answers",
        data_files="default/train/*.parquet",
        revision="refs/convert/parquet",
    ),
}


def _lookup(row: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; a field whose own name has dots wins over the path."""
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            raise FieldError(path, f"missing, the row has {', '.join(map(str, row)) or 'no fields'}")
    return value


def _text(row: Mapping[str, Any], path: str) -> str:
    value = _lookup(row, path)
    if not isinstance(value, str):
        raise FieldError(path, f"{_kind(value)}, wanted text")
    return checked_unicode(value, path)


def checked_unicode(value: str, field: str) -> str:
    """`value`, which JSON's escapes can make of half a character that no file can hold."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise FieldError(field, f"half a surrogate pair at character {error.start}, wanted Unicode text") from error
    return value


def _number(row: Mapping[str, Any], path: str) -> float:
    value = _lookup(row, path)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise FieldError(path, f"{_kind(value)}, wanted a number")
    return value


def _quotes(row: Mapping[str, Any], path: str) -> str:
    """Quotes as `{title: [...], extract: [...]}` or as `[{title, extract}, ...]`, the two ways that they are stored."""
    value = _lookup(row, path)
    if value is None:
        return ""
    if isinstance(value, Mapping):
        titles, extracts = _lookup(row, f"{path}.title"), _lookup(row, f"{path}.extract")
        if not (isinstance(titles, list) and isinstance(extracts, list) and len(titles) == len(extracts)):
            raise FieldError(path, "title and extract are not two lists of one length")
        value = [{"title": title, "extract": extract} for title, extract in zip(titles, extracts, strict=True)]
    if not isinstance(value, list):
        raise FieldError(path, f"{_kind(value)}, wanted quotes with title and extract")
    quotes = {path: value}
    return "\n\n".join(
        f"{_text(quotes, f'{path}.{i}.title')}\n{_text(quotes, f'{path}.{i}.extract')}".strip()
        for i in range(len(value))
    )


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return f"{value!r:.40} ({type(value).__name__})"
