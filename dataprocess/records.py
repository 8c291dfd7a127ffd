"""The sample that every source produces, the reasons to reject a record, and the reader of JSON files."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .image_io import check_image_name
from .messages import shorten

PLACEHOLDER = "<|extra_0|>"
"""Marks an image's position in a question. Repeated from the language model, which is not imported here; a test holds
the two together."""
_BLANKS = re.compile(r"[ \t\n\r]*")


class DataError(Exception):
    """A mistake in the configuration or in a whole file; the message is for the user."""


class RecordError(Exception):
    """An unusable record, or one of its captions: `reason` is a short text to count by, `detail` shows the value."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation about zero, one or more images."""

    images: tuple[str, ...]
    """Names relative to the source's image folder, in the order of the placeholders."""
    turns: tuple[tuple[str, str | list[str]], ...]
    """(question, answer) pairs; a list holds alternative answers to the same question."""
    left_out: tuple[tuple[int, RecordError], ...] = ()
    """Alternatives that are not usable: position in the record's list of captions, from 0, and the reason."""
    copies: tuple[str, tuple[str, ...]] | None = None
    """A folder and names in it, if the images were copied there."""


def check_text(value: object, what: str) -> str:
    """Return a value that is named `what` in reasons, if it is text that can be trained on and written as UTF-8.

    Raises:
        RecordError: it is not text, is empty or blank, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise RecordError(f"{what} is not text", f"got {shorten(value)}")
    if not value or value.isspace():
        raise RecordError(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        raise RecordError(f"{what} holds a lone surrogate", f"at character {exc.start}") from None
    return value


def check_image(value: object) -> str:
    """Return a value if it is a name that stays inside its image folder; the disk is not touched."""
    name = check_text(value, "image name")
    if problem := check_image_name(name):
        raise RecordError(problem, shorten(name))
    return name


@dataclass(frozen=True, slots=True)
class Record:
    """One element of an annotation file."""

    index: int
    """Its position in the file, from 0."""
    value: Any
    """The decoded JSON."""
    repeated_key: str | None
    """A key that one of its objects has twice: Python keeps the last value only."""
    fraction_read: float
    """How much of the file has been read."""


def read_records(path: Path) -> Iterator[Record]:
    """Read a JSON array, one element at a time, so that only the file's text is held, not all its objects.

    Args:
        path: a UTF-8 file, with or without a byte order mark. If its name ends in `.jsonl`, each line holds an element,
            and one line at a time is held.

    Raises:
        DataError: the file cannot be read, is not UTF-8, is not JSON (the position is named) or not an array.
    """
    if path.suffix.lower() == ".jsonl":
        yield from _lines(path)
        return
    text = _read_text(path)
    try:
        yield from _array_elements(text)
    except DataError as exc:
        raise DataError(f"{path}: {exc}") from None
    except json.JSONDecodeError as exc:
        cut = text.lstrip().startswith("[") and not text.rstrip().endswith("]")
        hint = "; it does not end with ], so it seems to be cut short" if cut else ""
        where = f"line {exc.lineno} column {exc.colno} (character {exc.pos})"
        raise DataError(f"{path}: not valid JSON at {where}: {exc.msg}{hint}") from None
    except RecursionError:
        raise DataError(f"{path}: not an annotation file: its JSON is nested too deeply") from None
    except ValueError as exc:  # a number of more digits than Python converts
        raise DataError(f"{path}: not valid JSON: {exc}") from None


def _lines(path: Path) -> Iterator[Record]:
    repeated: list[str] = []
    decode = _decoder(repeated).decode
    index, read = 0, 0
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                read += len(line)
                if line.isspace():
                    continue
                try:
                    value = decode(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except (ValueError, RecursionError) as exc:
                    raise DataError(f"{path}: line {number}: not valid JSON in UTF-8: {exc}") from None
                yield Record(index, value, repeated[0] if repeated else None, read / max(size, read))
                repeated.clear()
                index += 1
    except OSError as exc:
        raise DataError(f"{path}: cannot be read: {exc.strerror}") from None


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as exc:
        raise DataError(f"{path}: cannot be read: {exc.strerror}") from None
    encoding = json.detect_encoding(raw)  # by its zero bytes
    if not encoding.startswith("utf-8"):
        guess = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
        raise DataError(f"{path}: not UTF-8 but {guess}; convert it first (iconv -f {guess} -t UTF-8)")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        convert = "convert it first (iconv -f ENCODING -t UTF-8; Chinese files are often GB18030)"
        hint = "it seems to be cut short" if exc.reason == "unexpected end of data" else convert
        raise DataError(f"{path}: not UTF-8 at byte {exc.start}; {hint}") from None


def _decoder(repeated: list[str]) -> json.JSONDecoder:
    """Return a decoder that notes keys which one object has twice."""

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            repeated.append(Counter(key for key, _ in pairs).most_common(1)[0][0])
        return fields

    return json.JSONDecoder(object_pairs_hook=to_dict)


def _array_elements(text: str) -> Iterator[Record]:
    repeated: list[str] = []

    def skip_blanks(position: int) -> int:
        return _BLANKS.match(text, position).end()  # type: ignore[union-attr]

    decode = _decoder(repeated).raw_decode
    at = skip_blanks(0)
    if not text.startswith("[", at):
        value, _ = decode(text, at)  # raises if it is no JSON at all
        kind = {dict: "an object", str: "a string", type(None): "null"}.get(type(value), "a plain value")
        raise DataError(f"a JSON array of records was expected, got {kind}")
    at = skip_blanks(at + 1)
    index, more = 0, not text.startswith("]", at)
    while more:
        value, at = decode(text, at)
        yield Record(index, value, repeated[0] if repeated else None, at / len(text))
        repeated.clear()
        index += 1
        at = skip_blanks(at)
        if more := text.startswith(",", at):
            at = skip_blanks(at + 1)
    if not text.startswith("]", at):
        raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    end = skip_blanks(at + 1)
    if end != len(text):
        raise json.JSONDecodeError("Extra data after the array", text, end)
