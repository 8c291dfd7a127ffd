"""Tux Paint's stamps: pictures of things, with a caption in many languages next to each (GPL-2).

Debian's package tuxpaint-stamps-default has 785 of them. Folders say what kind of thing a picture shows. Letters,
numbers, coins, flags and signs are left out, and folders that stand for an occasion rather than a kind of thing
(seasonal).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

KIND_OF_FOLDER = {
    "animals": "animal",
    "food": "food",
    "plants": "plant",
    "vehicles": "vehicle",
    "military/vehicles": "vehicle",
    "household": "household",
    "clothes": "clothing",
    "town/houses": "building",
    "town/monuments": "building",
    "town/cartoon": "building",
    "hobbies/music": "instrument",
    "sports": "sport",
    "space": "space",
}
"""The kind of thing that a folder of stamps shows, and its folders within."""

KINDS = tuple(dict.fromkeys(KIND_OF_FOLDER.values()))
HELD_OUT_EVERY = 10
COPY_ENDINGS = ("_mirror", "_flip")  # drawn for Tux Paint's mirror button; the plain picture is next to them

_COLOURS = "black blue brown gold gray green grey orange pink purple red silver white yellow colorful"
_EMPTY = (
    "a about also an and at called for from in is it its of old on or our pair small some that the to with you your"
)
_NO_NAMES = frozenset(f"{_COLOURS} {_EMPTY}".split())


@dataclass(frozen=True)
class Picture:
    """A stamp."""

    path: str
    """Relative to the folder of all stamps, with forward slashes."""
    kind: str
    """One of KINDS."""
    caption: str
    """In English, one sentence."""

    @property
    def names(self) -> frozenset[str]:
        """Return the caption's content words, in lower case: no articles, no colours."""
        return content_words(self.caption)


def kind_of(path: str) -> str | None:
    """Return the kind of thing that a stamp shows, by its folder; None for those that are left out."""
    return next((kind for folder, kind in KIND_OF_FOLDER.items() if path.startswith(f"{folder}/")), None)


def content_words(text: str) -> frozenset[str]:
    """Return the words of a text that name or describe something, in lower case."""
    return frozenset(re.findall(r"[^\W\d_]{3,}", text.lower())) - _NO_NAMES


def first_sentence(text: str) -> str:
    """Return the first sentence of a caption, with its mark."""
    return re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0]


def load_pictures(folder: Path) -> list[Picture]:
    """Return all stamps of the kinds above, in the order of their paths; of equal files, the first.

    Raises:
        FileNotFoundError: if there are none.
    """
    pictures, seen = [], set()
    for file in sorted(folder.rglob("*.png")):
        path = file.relative_to(folder).as_posix()
        kind, caption_file = kind_of(path), file.with_suffix(".txt")
        if kind is None or file.stem.endswith(COPY_ENDINGS) or not caption_file.is_file():
            continue
        caption = first_sentence(caption_file.read_text(encoding="utf-8").split("\n", 1)[0])  # other languages follow
        digest = hashlib.sha256(file.read_bytes()).digest()
        if caption and digest not in seen:
            seen.add(digest)
            pictures.append(Picture(path, kind, caption))
    if not pictures:
        raise FileNotFoundError(
            f"{folder}: no stamps found; give the folder that holds {', '.join(sorted(KIND_OF_FOLDER)[:3])}, …"
        )
    return pictures


def split(pictures: Sequence[Picture], offset: int = 0) -> tuple[list[Picture], list[Picture]]:
    """Return training and held-out pictures: every tenth is held out, which takes a tenth of each folder.

    Args:
        pictures: in the order of their paths.
        offset: of the first one that is held out, below 10.
    """
    held_out = list(pictures[offset::HELD_OUT_EVERY])
    chosen = set(held_out)
    return [picture for picture in pictures if picture not in chosen], held_out
