"""What all sources share: the sample they produce, the reasons they reject with, and reading their JSON files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataprocess.image_io import check_image_name
from dataprocess.messages import shorten

PLACEHOLDER = "<|extra_0|>"
"""Marks an image's place in a question. The language model's own constant; repeated because nothing of it is imported
here, and a test holds the two together."""


class DataError(Exception):
    """A mistake in the configuration or in a whole file; the message is for the user."""


class RecordError(Exception):
    """One record cannot become a sample: ``reason`` is a short text to count by, ``detail`` says what was there."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class LeftOut:
    """One of a record's alternatives that was left out, while the record itself is kept."""

    position: int
    """Position in the record's list of captions, from 0."""
    reason: str
    """Short text to count by."""
    detail: str
    """What was there."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation about zero, one or more images."""

    images: tuple[str, ...]
    """Names relative to the source's image folder, in the order of the placeholders."""
    turns: tuple[tuple[str, str | list[str]], ...]
    """(question, answer) pairs; a list holds alternative answers to the same question."""
    left_out: tuple[LeftOut, ...] = ()
    """Alternatives that were not usable."""


def check_text(value: object, what: str) -> str:
    """Make sure that a value is text that can be trained on and written as UTF-8.

    Args:
        value: what stands in the annotation file.
        what: how the reason names it, such as "caption".

    Returns:
        The value, unchanged.

    Raises:
        RecordError: it is not text, is empty or blank, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise RecordError(f"{what} is not text", f"got {shorten(value)}")
    if not value or value.isspace():
        raise RecordError(f"{what} is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as exc:
            raise RecordError(f"{what} holds a lone surrogate", f"at character {exc.start}") from None
    return value


def check_image(value: object) -> str:
    """Make sure that a value names a file inside its image folder. The disk is not touched.

    Raises:
        RecordError: it is not text, or not a name that stays inside the folder.
    """
    name = check_text(value, "image name")
    problem = check_image_name(name)
    if problem is not None:
        raise RecordError(problem, shorten(name))
    return name


def read_records(path: Path) -> Iterator[tuple[int, float, Any]]:
    """Read a JSON array, one element at a time, so that only the file's text is held, not all its objects.

    Args:
        path: a UTF-8 file, with or without a byte order mark.

    Yields:
        (index from 0, fraction of the file read so far, element).

    Raises:
        DataError: the file cannot be read, is not UTF-8, is not JSON (the position is named) or not an array.
    """
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


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as exc:
        raise DataError(f"{path}: cannot be read: {exc.strerror}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        if exc.reason == "unexpected end of data":
            raise DataError(f"{path}: ends within a character (byte {exc.start}): it seems to be cut short") from None
        guess = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "its encoding, often GB18030"
        raise DataError(
            f"{path}: not UTF-8: byte {exc.start} is {raw[exc.start]:#04x}; convert it first "
            f"(iconv -f FROM -t UTF-8, FROM being {guess})"
        ) from None


_BLANK = re.compile(r"[ \t\n\r]*")


def _array_elements(text: str) -> Iterator[tuple[int, float, Any]]:
    def skip_blank(position: int) -> int:
        match = _BLANK.match(text, position)
        return match.end() if match else position

    decode = json.JSONDecoder().raw_decode
    at = skip_blank(0)
    if text[at : at + 1] != "[":
        # Whatever it is, it is no list of records; if it is not even JSON, the decoder knows the position.
        value, _ = decode(text, at)
        kind = {dict: "an object", str: "a string", type(None): "null"}.get(type(value), "a plain value")
        raise DataError(f"a JSON array of records was expected, got {kind}")
    at = skip_blank(at + 1)
    if text[at : at + 1] != "]":
        for index in range(len(text)):
            element, at = decode(text, at)
            yield index, at / len(text), element
            at = skip_blank(at)
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
            at = skip_blank(at + 1)
    end = skip_blank(at + 1)
    if end != len(text):
        raise json.JSONDecodeError("Extra data after the array", text, end)
