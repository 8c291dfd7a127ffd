"""Files of questions, one JSON object a line: `{"id": …, "image": "PATH" | ["PATH", …] | null, "prompt": "…"}`."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataprocess.messages import shorten

_EXPECTED = 'expected {"id": …, "image": "PATH" or ["PATH", …] or null, "prompt": "…"}'


@dataclass(frozen=True)
class Question:
    """One line."""

    id: str | int
    """Unique within the file."""
    images: tuple[Path, ...]
    """Where its pictures are, in the order of the placeholders."""
    prompt: str
    """As it is in the file."""


def read_questions(path: Path) -> list[Question]:
    """Read a file of questions; empty lines and other keys are ignored.

    Relative image paths count from the current folder, or from the file's own if nothing is there.

    Raises:
        ValueError: for a line that is not a question, an id that occurs twice, or a file without questions; with the
            line's number.
        OSError: if the file can't be read.
    """
    questions: list[Question] = []
    line_of: dict[str | int, int] = {}
    for number, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            question = _question(raw, path.parent)
            if question.id in line_of:
                raise ValueError(f"the id {question.id!r} is that of line {line_of[question.id]} too; ids must differ")
        except ValueError as error:
            raise ValueError(f"--batch {path}, line {number}: {error}") from error
        line_of[question.id] = number
        questions.append(question)
    if not questions:
        raise ValueError(f"--batch {path}: there is no question in it; {_EXPECTED} on each line")
    return questions


def _question(raw: bytes, folder: Path) -> Question:
    try:
        values = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({str(error)[:80]}); {_EXPECTED}") from error
    except RecursionError as error:
        raise ValueError(f"JSON that is nested too deeply; {_EXPECTED}") from error
    if not isinstance(values, dict):
        raise ValueError(f"got {_shown(values)}; {_EXPECTED}")
    index, prompt, images = values.get("id"), values.get("prompt"), values.get("image")
    if not isinstance(index, str | int) or isinstance(index, bool):
        raise ValueError(f"the id is {_shown(index)}, expected a text or a whole number; {_EXPECTED}")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"the prompt is {_shown(prompt)}, expected a text that is not empty; {_EXPECTED}")
    names = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"the image is {_shown(images)}, expected a path, a list of paths, or null; {_EXPECTED}")
    return Question(index, tuple(_resolve(name, folder) for name in names), prompt)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shorten(key, 40)} is there twice; keep one of them")
    return values


def _resolve(name: str, folder: Path) -> Path:
    here, there = Path(name), folder / name
    return there if not os.path.exists(here) and os.path.exists(there) else here  # noqa: PTH110, raises for no name


def _shown(value: object) -> str:
    return "missing" if value is None else shorten(value, 40)
