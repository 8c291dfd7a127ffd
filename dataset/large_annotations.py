"""Image maps and captions of millions of samples, as JSON lines or Parquet: they stay on the disk.

    image map   {"key": str, "image_file": str | [str, ...] | null, "ID": int, "path": str}
    captions    {"ID": int, "q": str, "a": str | [str, ...]}   or   {"ID": int, "turns": [{"q", "a"}, ...]}

Each line, or row, is one sample. Opening reads both files once, side by side, one row at a time, and checks what
`Annotations` checks; memory then holds where the rows are, 8 to 24 bytes a sample, which data workers share. A sample
is read when it is asked for.
"""

from __future__ import annotations

import functools
import hashlib
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .annotations import Annotations, Sample, digest_sample, find_folder, parse_entry, short
from .prompt import SampleError
from .rows import JsonLines, ParquetRows, open_rows


class LargeAnnotations(Annotations):
    """The samples of two large files, in the order of the image map; arguments and errors are those of `Annotations`.

    The same samples have the same fingerprint, whatever files they are in.
    """

    def __init__(
        self,
        image_map: str | Path,
        captions_file: str | Path,
        max_samples: int | None = None,
        *,
        skip_bad: bool = False,
        need_folders: bool = True,
    ) -> None:
        self._files = self._entries, _ = open_rows(image_map), open_rows(captions_file)
        self._folder_of = functools.partial(_find_folder, str(image_map), need_folders)
        self.errors = []
        digest, captions = hashlib.sha256(), _CaptionsById(self._files[1])
        entry_rows, caption_rows, hashes = array("i"), array("i"), array("q")
        for row, entry in enumerate(islice(self._entries, max_samples)):
            key = _key_of(self._entries, row, entry)
            hashes.append(hash(key))
            try:
                sample = parse_entry(key, entry, captions, self._folder_of)
                if captions.owners[captions.row] >= 0:
                    raise SampleError(self._same_id(sample.id, captions.owners[captions.row], key))
            except SampleError as error:
                self.errors.append(str(error))
                continue
            captions.owners[captions.row] = row
            digest_sample(digest, sample)
            entry_rows.append(row)
            caption_rows.append(captions.row)
        self._refuse_repeated(np.frombuffer(hashes, dtype=np.int64))
        if not hashes:
            raise ValueError(f"{image_map} holds no samples; prepare the data with dataprocess/process_image.py")
        surplus = len(captions) - len(hashes) if max_samples is None else 0
        self.check_counts(image_map, captions_file, skip_bad and bool(entry_rows), surplus)
        self.fingerprint = digest.hexdigest()[:16]
        self._rows = entry_rows, caption_rows

    def __len__(self) -> int:
        return len(self._rows[0])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        entry, caption = (file[rows[index]] for file, rows in zip(self._files, self._rows, strict=True))
        return self._sample(entry, caption)

    def __iter__(self) -> Iterator[Sample]:
        both = (file.in_order(rows) for file, rows in zip(self._files, self._rows, strict=True))
        return (self._sample(entry, caption) for entry, caption in zip(*both, strict=True))

    def _sample(self, entry: dict[str, Any], caption: dict[str, Any]) -> Sample:
        return parse_entry(entry["key"], entry, {str(entry["ID"]): caption}, self._folder_of)

    def _same_id(self, sample_id: int, first: int, key: str) -> str:
        return f"sample {sample_id}: {short(self._entries[first]['key'])} and {short(key)} both have this ID"

    def _refuse_repeated(self, hashes: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        """Refuse keys that stand twice: in a JSON object, one of the two samples would be lost."""
        order = hashes.argsort(kind="stable")
        for place in np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]):
            first, second = (int(order[place + step]) for step in (0, 1))
            if (key := self._entries[first]["key"]) == self._entries[second]["key"]:  # else only their hashes agree
                raise ValueError(
                    f"{self._entries.path}: the key {short(key)} stands in rows {first + 1} and {second + 1}"
                )


class _CaptionsById:
    """Finds captions by ID while the files are opened.

    As long as they come in the order of the image map, the file is read once, along with that.
    """

    row: int
    """Where the last one found is."""
    owners: array[int]
    """(rows read,) Row of the good sample that a caption belongs to, or -1."""

    def __init__(self, rows: JsonLines | ParquetRows) -> None:
        self._rows = rows
        self._unread = iter(rows)
        self._ids = array("q")
        self._by_id: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None = None
        self.owners = array("i")
        self.row = -1

    def __len__(self) -> int:
        """Return how many there are, after reading to the end."""
        self._index()
        return len(self._ids)

    def _read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (ID, caption) of the rows that were not read yet."""
        for caption in self._unread:
            found = caption.get("ID")
            if type(found) is not int or not -(2**63) <= found < 2**63:
                where = f"{self._rows.path}, row {len(self._ids) + 1}"
                raise ValueError(f"{where}: ID must be an integer of at most 64 bits, got {short(found)}")
            self._ids.append(found)
            self.owners.append(-1)
            yield found, caption

    def get(self, sample_id: str) -> Any:
        """Return the caption of an ID; None if there is none."""
        wanted = int(sample_id)
        for found, caption in self._read():
            if found == wanted:
                self.row = len(self._ids) - 1
                return caption
        following = self.row + 1  # where it is in files of the same order, but for some rows
        if not (following < len(self._ids) and self._ids[following] == wanted):
            ids, rows = self._index()
            place = int(ids.searchsorted(wanted))
            if place == len(ids) or ids[place] != wanted:
                return None
            following = int(rows[place])
        self.row = following
        return self._rows[following]

    def _index(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return all IDs in ascending order, and their rows; refuse one that stands twice."""
        if self._by_id is None:
            for _ in self._read():
                pass
            numbers = np.frombuffer(self._ids, dtype=np.int64)
            rows = numbers.argsort(kind="stable")
            ids = numbers[rows]
            twice = np.flatnonzero(ids[1:] == ids[:-1])
            if len(twice):
                first, second = (int(rows[twice[0] + step]) + 1 for step in (0, 1))
                raise ValueError(f"{self._rows.path}: ID {ids[twice[0]]} stands in rows {first} and {second}")
            self._by_id = ids, rows
        return self._by_id


def entries_by_key(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (key, entry) of an image map."""
    rows = open_rows(path)
    for row, entry in enumerate(rows):
        yield _key_of(rows, row, entry), entry


def _key_of(rows: JsonLines | ParquetRows, row: int, entry: dict[str, Any]) -> str:
    key = entry.get("key")
    if not isinstance(key, str):
        raise ValueError(f"{rows.path}, row {row + 1}: `key` must be text that no other row has, got {short(key)}")
    return key


@functools.lru_cache(maxsize=10_000)
def _find_folder(image_map: str, must_exist: bool, written: str) -> str:
    return find_folder(Path(image_map), must_exist, written)
