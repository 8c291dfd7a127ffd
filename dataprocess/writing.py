"""Writing the output files: all of them whole, or none touched."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from dataprocess.config import Config, Source
from dataprocess.records import DataError, Sample


class _Reason(Protocol):
    @property
    def reason(self) -> str: ...
    @property
    def detail(self) -> str: ...


class Outputs:
    """The image map, the captions, and the list of rejects, written one entry a line while the records come in.

    A context manager. The files grow under temporary names in their own folders. Leaving the block normally puts all
    of them in place; leaving it by an exception, or failing to put one in place, leaves the earlier files as they were.

    image map: ``{key: {"image_file": name | [names] | null, "ID": int, "path": folder}}``
    captions: ``{ID: {"q": …, "a": text | [texts]}}``, of several turns ``{ID: {"turns": [{"q", "a"}, …]}}``
    rejects (JSON lines): ``{"source", "label_file", "record": index from 0, "image", "reason", "detail"}``, with
    ``"caption"`` (index from 0) where only one of a record's captions was left out
    """

    def __init__(self, config: Config) -> None:
        self._paths = (config.output_captions, config.output_image_map, config.output_rejects)
        self._files: list[_NewFile] = []
        self._entries = 0
        self._encode = json.JSONEncoder(ensure_ascii=False).encode

    def __enter__(self) -> Outputs:
        try:
            for path in self._paths:
                self._files.append(_NewFile(path))
        except OSError as exc:
            self._discard()
            raise DataError(_cannot_write(exc)) from None
        self._captions, self._image_map, self._rejects = self._files
        return self

    def add(self, source: Source, index: int, sample_id: int, sample: Sample) -> None:
        """Write one sample.

        Args:
            source: where it comes from.
            index: its record's position in the source's file, from 0.
            sample_id: its ID, unique over all sources.
            sample: what to write.
        """
        images = sample.images
        image_file: Any = None if not images else images[0] if len(images) == 1 else images
        # Source and record make the key unique; the file's name is there for people who search.
        key = f"{source.name}/{index:06d}" + (f"/{images[0][-100:]}" if images else "")
        entry = {"image_file": image_file, "ID": sample_id, "path": source.image_path}
        turns: list[dict[str, Any]] = [{"q": question, "a": answer} for question, answer in sample.turns]
        caption = turns[0] if len(turns) == 1 else {"turns": turns}
        start = ",\n" if self._entries else "{\n"
        self._image_map.write(f"{start}{self._encode(key)}: {self._encode(entry)}".encode())
        self._captions.write(f'{start}"{sample_id}": {self._encode(caption)}'.encode())
        self._entries += 1

    def reject(self, source: Source, index: int, image: object, why: _Reason, caption: int | None = None) -> None:
        """Write one line about a record, or one of its captions, that is left out.

        Args:
            source: where it comes from.
            index: the record's position in the source's file, from 0.
            image: the image's name as the record has it, as far as it has one.
            why: ``reason`` and ``detail``.
            caption: the caption's position in the record, from 0; None if the whole record is left out.
        """
        line: dict[str, Any] = {"source": source.name, "label_file": str(source.label_file), "record": index}
        if caption is not None:
            line["caption"] = caption
        line |= {"image": image, "reason": why.reason, "detail": why.detail}
        # A lone surrogate becomes \udXXX, which is how JSON writes it.
        self._rejects.write((self._encode(line) + "\n").encode(errors="backslashreplace"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                end = b"\n}\n" if self._entries else b"{}\n"
                self._image_map.write(end)
                self._captions.write(end)
                for file in self._files:
                    file.finish()
                _put_in_place(self._files)
            elif isinstance(error, OSError):
                raise error  # a full disk while writing
        except OSError as exc:
            raise DataError(_cannot_write(exc)) from None
        finally:
            self._discard()

    def _discard(self) -> None:
        for file in self._files:
            file.discard()


def _cannot_write(exc: OSError) -> str:
    return f"{exc.filename or 'output'}: cannot be written: {exc.strerror}; earlier output files are as they were"


class _NewFile:
    def __init__(self, path: Path) -> None:
        self.target = Path(os.path.realpath(path))  # a link stays a link, and what it points to is replaced
        self.target.parent.mkdir(parents=True, exist_ok=True)
        stem = f".{self.target.name[:100]}.{secrets.token_hex(4)}"
        self.temporary = self.target.with_name(stem + ".new")
        self.aside = self.target.with_name(stem + ".old")
        self._file = self.temporary.open("xb", buffering=1 << 20)

    def write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, str(self.target)) from None

    def finish(self) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, str(self.target)) from None

    def discard(self) -> None:
        try:
            self._file.close()
        except OSError:  # what is still buffered does not fit either
            pass
        finally:
            self.temporary.unlink(missing_ok=True)


def _put_in_place(files: list[_NewFile]) -> None:
    """Replace all files or none.

    The captions (the first file) are moved away before, and put in place after, everything else: new captions beside
    an old image map would give photos the answers of others. A kill in between leaves no captions, which is noticed.
    """
    moved: list[_NewFile] = []
    placed: list[_NewFile] = []
    try:
        for file in files:
            if file.target.exists():
                os.replace(file.target, file.aside)  # noqa: PTH105
                moved.append(file)
        for file in reversed(files):
            os.replace(file.temporary, file.target)  # noqa: PTH105
            placed.append(file)
    except BaseException:
        for file in placed:
            file.target.unlink(missing_ok=True)
        for file in reversed(moved):
            os.replace(file.aside, file.target)  # noqa: PTH105
        raise
    for file in moved:
        file.aside.unlink(missing_ok=True)
    for folder in {file.target.parent for file in files}:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # the renames themselves
        finally:
            os.close(descriptor)
