"""Files of questions, a JSON object each: `{"id": …, "image": "PATH" | ["PATH", …] | null, "prompt": "…"}`.

One is on each line, or all are in a JSON array.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
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
    """Read a file of questions; empty lines are skipped, what is no question is refused with its number.

    Relative image paths count from the image folder; without one, from the current folder, or from the file's own if
    nothing is there.
    """
    name, content = f"{flag} {path}", path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if content.lstrip().startswith(b"["):
        records = [(f"{name}, record {at}", value) for at, value in enumerate(_parse(content, name), start=1)]
    else:
        lines = ((f"{name}, line {at}", raw) for at, raw in enumerate(content.split(b"\n"), start=1) if raw.strip())
        records = [(place, _parse(raw, place)) for place, raw in lines]
    return make_questions(records, name, path.parent, image_folder)


def make_questions(
    records: Sequence[tuple[str, Any]], name: str, folder: Path, image_folder: Path | None
) -> list[Question]:
    """Make questions of a file's values, each given with its place in the file called `name`; see `read_questions`."""
    questions: list[Question] = []
    place_of: dict[str | int, str] = {}
    for place, value in records:
        try:
            question = _question(value, folder, image_folder)
            if question.id in place_of:
                before = place_of[question.id]
                raise ValueError(f"the id {shorten(question.id)} is that of {before}, too; ids must be unique")
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        place_of[question.id] = place.removeprefix(f"{name}, ")
        questions.append(question)
    if not questions:
        raise ValueError(f"{name}: there is no question in it; {_EXPECTED} on each line")
    return questions


def _parse(raw: bytes, name: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON ({str(error)[:80]}); {_EXPECTED}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _question(values: Any, folder: Path, image_folder: Path | None) -> Question:
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


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's values; refuse a key that is there twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shorten(key, 40)} is there twice; keep one of them")
    return values


def resolve_picture(name: str, folder: Path) -> Path:
    """Return the path of a picture, relative to the current folder, or to this one if nothing is there."""
    here, there = Path(name), folder / name
    return there if not os.path.exists(here) and os.path.exists(there) else here  # noqa: PTH110, raises for no name
