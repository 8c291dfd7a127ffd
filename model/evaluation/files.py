"""JSON in its two forms, one value or one on each line, and files that are written whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dataprocess.file_lock import replace_file

from ..asking.question_file import unique_keys


def read_json(path: Path, flag: str) -> Any:
    """Return a file's one JSON value, or the list of its lines' values.

    Args:
        path: a UTF-8 file.
        flag: names the file in messages.

    Raises:
        ValueError: if it can't be read, or is neither.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe can be read only once
            raise ValueError(f"{flag} {path}: not a regular file; give one that holds JSON")
        raw = path.read_bytes()
        if raw.startswith((b"\x1f\x8b", b"PK\x03\x04")):
            raise ValueError(f"{flag} {path}: the file is compressed; unpack it first")
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {path}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{flag} {path}: the file is empty")
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        whole = error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{flag} {path}: {_reason(error)}") from error
    values = []
    for number, line in lines:
        try:
            values.append(json.loads(line, object_pairs_hook=unique_keys))
        except (ValueError, RecursionError) as error:
            where, why = (f", line {number}", error) if values else ("", whole)
            raise ValueError(f"{flag} {path}{where}: {_reason(why)}") from error
    return values


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its JSON is nested too deeply"
    return f"not JSON ({error})" if isinstance(error, json.JSONDecodeError) else str(error)


def to_json(value: Any, indent: int | None = None) -> str:
    """Write a value as JSON; half a surrogate pair, which UTF-8 can't hold, becomes the escape that JSON has for it."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def write_whole(path: Path, text: str) -> None:
    """Write a text, or replace it, so that nobody sees half of it; see `replace_file`."""
    replace_file(path, text.encode("utf-8", errors="backslashreplace"))
