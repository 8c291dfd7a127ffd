"""Files of questions, one JSON object a line: `{"id": …, "image": "PATH" | ["PATH", …] | null, "prompt": "…"}`."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataprocess.messages import shorten

_EXPECTED = 'expected {"id": …, "image": "PATH" or ["PATH", …] or null, "prompt": "…"}'


@dataclass(frozen=True)
class Question:
    """One line."""

    id: str | int  # unique within the file
    images: tuple[Path, ...]  # in the order of the placeholders
    prompt: str
    further: dict[str, Any] = field(default_factory=dict, compare=False)
    """The line's other keys."""


def read_questions(path: Path, flag: str = "--batch", image_folder: Path | None = None) -> list[Question]:
    """Read a file of questions; empty lines are skipped, other lines that are no question refused with their number.

    Relative image paths count from the image folder; without one, from the current folder, or from the file's own if
    nothing is there.
    """
    questions: list[Question] = []
    line_of: dict[str | int, int] = {}
    for number, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            question = _question(raw, path.parent, image_folder)
            if question.id in line_of:
                raise ValueError(f"the id {question.id!r} is that of line {line_of[question.id]} too; ids must differ")
        except ValueError as error:
            raise ValueError(f"{flag} {path}, line {number}: {error}") from error
        line_of[question.id] = number
        questions.append(question)
    if not questions:
        raise ValueError(f"{flag} {path}: there is no question in it; {_EXPECTED} on each line")
    return questions


def _question(raw: bytes, folder: Path, image_folder: Path | None) -> Question:
    try:
        values = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({str(error)[:80]}); {_EXPECTED}") from error
    if not isinstance(values, dict):
        raise ValueError(f"got {shorten(values, 40)}; {_EXPECTED}")
    index: Any = values.get("id")
    prompt: Any = values.get("prompt")
    images: Any = values.get("image")
    names = [] if images is None else [images] if isinstance(images, str) else images
    valid = {
        "id": isinstance(index, str | int) and not isinstance(index, bool),
        "prompt": isinstance(prompt, str) and prompt.strip(),
        "image": isinstance(names, list) and all(isinstance(name, str) and name for name in names),
    }
    for key, is_valid in valid.items():
        if not is_valid:
            got = shorten(values[key], 40) if key in values else "missing"
            raise ValueError(f"the {key} is {got}; {_EXPECTED}")
    further = {key: value for key, value in values.items() if key not in ("id", "image", "prompt")}
    paths = tuple(image_folder / name if image_folder else resolve_picture(name, folder) for name in names)
    return Question(index, paths, prompt, further)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shorten(key, 40)} is there twice; keep one of them")
    return values


def resolve_picture(name: str, folder: Path) -> Path:
    """Return the path of a picture, relative to the current folder, or to this one if nothing is there."""
    here, there = Path(name), folder / name
    return there if not os.path.exists(here) and os.path.exists(there) else here  # noqa: PTH110, raises for no name
