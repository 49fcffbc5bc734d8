"""General text: a file of documents."""

import json
from pathlib import Path

from hycam.errors import InputError


def read_documents(path: str | Path, limit: int | None = None) -> list[str]:
    """The `text` of the lines of a JSON Lines file, of the first `limit` where it is given.

    Raises:
        InputError: with file and line, where there is no text; without a line, where the file has no line or can't be
            read.
    """
    path = Path(path).expanduser()
    documents: list[str] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if len(documents) == limit:
                    break
                documents.append(_text(line, f"{path}:{number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read as JSON Lines of text: {error}") from error
    if not documents:
        raise InputError(f"{path}: no line, wanted at least one with a text")
    return documents


def _text(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: text: {text!r} given, text is wanted")
    return text
