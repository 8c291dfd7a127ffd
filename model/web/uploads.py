"""Uploaded files: one private folder, from which each file goes as soon as its question is asked."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import io
import json
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from dataprocess.image_io import ImageError, load_image

from .words import Refusal

UNSENT_SECONDS = 900
"""An upload that no question has taken for so long is deleted, though its page is still open."""
MOST_BYTES = 2 * 2**30
"""Of all uploads that wait for their question; beyond it no more are accepted."""
PREFIX = "web_demo_uploads_"
_THUMBNAIL = (480, 320)


class UploadFolder:
    """A temporary folder for uploads, which only this user can read. `close` deletes it."""

    def __init__(self) -> None:
        _delete_leftovers()
        self._folder = tempfile.TemporaryDirectory(prefix=PREFIX)
        self.path = Path(self._folder.name).resolve()
        self._held = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self._held, fcntl.LOCK_EX)  # until this process ends
        self._own = self.path / "own"  # a folder for each upload
        self._own.mkdir()
        self._owners: dict[Path, str] = {}

    def close(self) -> None:
        """Delete the folder with all that is in it."""
        self._folder.cleanup()

    def adopt(self, path: str, owner: str) -> str:
        """Give an uploaded file a path that nobody can guess, and note whose it is; return the new path.

        Gradio's own path is made of the content: two visitors with the same picture would share one file, and whoever
        knows a picture could ask whether it is here.
        """
        old = Path(path)
        folder = self._own / secrets.token_urlsafe(16)
        folder.mkdir()
        new = folder / old.name
        new.hardlink_to(old)
        self._owners[new] = owner
        return str(new)

    def clear_shared(self) -> None:
        """Delete what Gradio stored and no upload needs any more, parts of broken uploads too."""
        for entry in self.path.iterdir():
            if entry != self._own:
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)

    def find(self, path: object) -> Path | None:
        """Return the uploaded file that a page names, or None for any other file or folder."""
        if not isinstance(path, str) or not path or "\0" in path:
            return None
        try:
            file = Path(path).resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            return None
        return file if self._own in file.parents and file.is_file() else None

    def load(self, path: object, name: object, most_bytes: int) -> Image.Image:
        """Open an uploaded picture; delete its file if it can't be used.

        Raises:
            Refusal: if it is no upload or no longer there, no picture, damaged, or too large.
        """
        file = self.find(path)
        shown = (name if isinstance(name, str) and name else file.name if file else "?")[:80]
        if file is None:
            raise Refusal("gone_picture", name=shown)
        try:
            if file.stat().st_size > most_bytes:
                raise too_large(shown, most_bytes)
            return load_image(file)
        except (ImageError, Refusal) as error:
            self.delete(file)
            if isinstance(error, Refusal) or error.reason == "image too large":
                raise too_large(shown, most_bytes) from None
            raise Refusal("bad_picture", name=shown) from None

    def delete(self, path: str | Path) -> None:
        """Delete an upload, if there is one of this path."""
        file = self.find(str(path))
        if file is None:
            return
        self._owners.pop(file, None)
        shutil.rmtree(file.parent, ignore_errors=True)

    def delete_of(self, owner: str) -> None:
        """Delete the uploads that an owner has not asked about."""
        for file in [file for file, other in list(self._owners.items()) if other == owner]:
            self.delete(file)

    def sweep(self, older_than: float = UNSENT_SECONDS) -> None:
        """Delete files that have been there for longer than so many seconds."""
        for file in self._files():
            with contextlib.suppress(OSError):
                if time.time() - file.stat().st_mtime > older_than:
                    self.delete(file)

    def has_room(self, size: int) -> bool:
        """Return whether an upload of so many bytes may come in."""
        total = 0
        for file in self._files():
            with contextlib.suppress(OSError):
                total += file.stat().st_size
        return total + size <= MOST_BYTES and size < shutil.disk_usage(self.path).free

    def _files(self) -> list[Path]:
        """Return all files; another thread may delete some meanwhile, which is an error to `Path.rglob`."""
        return [Path(folder, name) for folder, _, names in os.walk(self.path) for name in names]


def _delete_leftovers() -> None:
    """Delete the folders of programs that were killed: nobody holds their locks."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            is_new = time.time() - folder.stat().st_mtime < 60  # it may be locked in a moment
            if is_new or folder.is_symlink() or not (folder / "own").is_dir():
                continue
            held = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(held)


def too_large(name: str, most_bytes: int) -> Refusal:
    """Return what a visitor is told about a picture that is too large."""
    return Refusal("large_picture", name=name, megabytes=megabytes(most_bytes))


def megabytes(count: int) -> float:
    """Return a number of bytes in millions, as people read it."""
    return round(count / 10**6, 3)


def thumbnail(image: Image.Image) -> str:
    """Return a small copy of a picture as a `data:` URI, so that the page needs no file."""
    small = image.copy() if max(image.size) < 10_000 else image.reduce(max(image.size) // 5_000)
    small.thumbnail(_THUMBNAIL)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def files_of(packet: object) -> tuple[str, list[dict[str, Any]], bool]:
    """Return text and files of the question box, and whether the page shows messages; the JSON may be anything."""
    try:
        box = json.loads(packet) if isinstance(packet, str) else {}
    except (ValueError, RecursionError):
        box = {}
    box = box if isinstance(box, dict) else {}
    text, files = box.get("text"), box.get("files")
    return (
        text if isinstance(text, str) else "",
        [file for file in files if isinstance(file, dict)] if isinstance(files, list) else [],
        isinstance(box.get("shown"), int) and box["shown"] > 0,
    )
