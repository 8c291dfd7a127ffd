"""A picture's bytes as they are stored, for what copies pictures or tells them apart; `image_io.py` opens them."""

from __future__ import annotations

import hashlib
import os

from .image_io import ImageError, check_file, image_error, read_from_shard


def read_image(path: str | os.PathLike[str]) -> bytes:
    """Read a picture's bytes as they are stored, within the limits of `load_image`; they may be of no picture.

    Raises:
        ImageError: the file is missing, a directory or no regular file, empty, unreadable, or too large.
    """
    path = os.fspath(path)
    stored = read_from_shard(path) if ".tar/" in path else None
    if stored is not None:
        return stored
    check_file(path)
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read()
    except OSError as exc:
        raise image_error(path, "unreadable", exc.strerror or str(exc)) from None


def content_key(path: str | os.PathLike[str]) -> bytes | None:
    """Return the SHA-256 of a picture's bytes; None if they cannot be read, and `load_image` says why."""
    try:
        return hashlib.sha256(read_image(path)).digest()
    except ImageError:
        return None
