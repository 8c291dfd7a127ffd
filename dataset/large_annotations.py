"""Image maps and captions of millions of samples, as JSON lines or Parquet: they stay on the disk.

    image map   {"key": str, "image_file": str | [str, ...] | null, "ID": int, "path": str}
    captions    {"ID": int, "q": str, "a": str | [str, ...]}   or   {"ID": int, "turns": [{"q", "a"}, ...]}

Each line, or row, is one sample. Opening reads both files once, one row at a time, and checks what `Annotations`
checks; memory then holds where the rows are, 8 to 24 bytes a sample, which data workers share. A sample is read when
it is asked for.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import os
import stat
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .annotations import Annotations, Sample, digest_sample, find_folder, parse_entry, refuse_repeated_keys, short
from .prompt import SampleError

MOST_GROUP_BYTES = 16 * 2**20
"""Size of the largest row group of a Parquet file: for each sample, a whole group is decoded."""
_COLUMNS = ("key", "image_file", "iamge_file", "ID", "path", "q", "a", "turns")


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
        self._folder_of = functools.partial(_find_folder, Path(image_map), need_folders)
        self.errors = []
        digest, captions = hashlib.sha256(), _CaptionsById(self._files[1])
        owner = np.full(len(captions), -1, dtype=np.int32)  # row of the good sample that has a caption
        entry_rows, caption_rows, hashes = array("i"), array("i"), array("q")
        for row, entry in enumerate(islice(self._entries, max_samples)):
            key = _key_of(self._entries, row, entry)
            hashes.append(hash(key))
            try:
                sample = parse_entry(key, entry, captions, self._folder_of)
                if owner[captions.row] >= 0:
                    raise SampleError(self._same_id(sample.id, int(owner[captions.row]), key))
            except SampleError as error:
                self.errors.append(str(error))
                continue
            owner[captions.row] = row
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
    """Finds captions by ID while the files are opened; `row` is where the last one is."""

    def __init__(self, rows: JsonLines | ParquetRows) -> None:
        ids = array("q")
        for number, caption in enumerate(rows, start=1):
            found = caption.get("ID")
            if type(found) is not int or not -(2**63) <= found < 2**63:
                raise ValueError(
                    f"{rows.path}, row {number}: ID must be an integer of at most 64 bits, got {short(found)}"
                )
            ids.append(found)
        self._rows = rows
        self._ids = np.frombuffer(ids, dtype=np.int64)
        self._order = self._ids.argsort(kind="stable")
        self._sorted = self._ids[self._order]
        twice = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
        if len(twice):
            first, second = (int(self._order[twice[0] + step]) + 1 for step in (0, 1))
            raise ValueError(f"{rows.path}: ID {self._sorted[twice[0]]} stands in rows {first} and {second}")
        self.row = -1

    def __len__(self) -> int:
        return len(self._ids)

    def get(self, sample_id: str) -> Any:
        """Return the caption of an ID; None if there is none."""
        wanted, following = int(sample_id), self.row + 1
        if not (following < len(self) and self._ids[following] == wanted):  # in the order of the image map, it is there
            place = int(self._sorted.searchsorted(wanted))
            if place == len(self) or self._sorted[place] != wanted:
                return None
            following = int(self._order[place])
        self.row = following
        return self._rows[following]


def open_rows(path: str | Path) -> JsonLines | ParquetRows:
    """Open a file of rows, by the ending of its name.

    Raises:
        ValueError: it is of another kind, cannot be read, or pyarrow is missing.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".jsonl":
            return JsonLines(path)
        if path.suffix.lower() == ".parquet":
            return ParquetRows(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    raise ValueError(f"{path}: image map and captions must both be .json, or both be .jsonl or .parquet")


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
def _find_folder(image_map: Path, must_exist: bool, written: str) -> str:
    return find_folder(image_map, must_exist, written)


class JsonLines:
    """A file with a JSON object in each line. Iterating over it, from the start, finds out where the rows are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None  # in this process
        self._ends = array("q", [0])  # (rows + 1,) bytes
        if not stat.S_ISREG(os.fstat(self._open()).st_mode):
            raise ValueError(f"{path}: a regular file was expected, because it is read sample by sample")
        self._stamp = self._status()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._ends, position = array("q", [0]), 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1 and line.startswith(codecs.BOM_UTF8):
                    self._ends[0] = len(codecs.BOM_UTF8)
                position += len(line)
                if line.isspace():
                    self._ends[-1] = position
                    continue
                self._ends.append(position)
                yield self._decode(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, f"line {number}")

    def __getitem__(self, row: int) -> dict[str, Any]:
        start, end = self._ends[row], self._ends[row + 1]
        if self._status() != self._stamp:
            raise ValueError(f"{self.path} has changed since it was opened; start again")
        return self._decode(os.pread(self._open(), end - start, start), f"row {row + 1}")

    def _decode(self, line: bytes, where: str) -> dict[str, Any]:
        try:
            value = _decode_json(line.decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}, {where}: no valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError(f"{self.path}, {where}: a JSON object was expected, got {short(value)}")
        return value

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not wait
        return self._descriptor

    def _status(self) -> tuple[int, int]:
        status = os.fstat(self._open())
        return status.st_size, status.st_mtime_ns

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_descriptor": None}  # a process that is not forked opens the file itself

    def __del__(self) -> None:
        if vars(self).get("_descriptor") is not None:
            os.close(self._open())


_decode_json = json.JSONDecoder(object_pairs_hook=refuse_repeated_keys).decode


class ParquetRows:
    """A Parquet file: the row group of a row is decoded, and the last group kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._process = 0
        self._stamp: tuple[int, int] | None = None
        self._group: tuple[int, Any] = (-1, None)
        file = self._open()
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        self._starts = np.cumsum([0, *(group.num_rows for group in groups)])  # (groups + 1,) rows
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > MOST_GROUP_BYTES:
            found = (
                f"{path} has row groups of {largest:,} bytes, and each sample decodes one; at most {MOST_GROUP_BYTES:,}"
            )
            advice = "write it again: pyarrow.parquet.write_table(table, path, row_group_size=1000)"
            raise ValueError(f"{found} are accepted; {advice}")
        self._columns = [name for name in file.schema_arrow.names if name in _COLUMNS]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(len(self._starts) - 1):
            yield from map(_without_null_texts, self._read_group(number).to_pylist())

    def __getitem__(self, row: int) -> dict[str, Any]:
        number = int(self._starts.searchsorted(row, side="right")) - 1
        if self._group[0] != number:
            self._group = number, self._read_group(number)
        return _without_null_texts(self._group[1].slice(row - int(self._starts[number]), 1).to_pylist()[0])

    def _read_group(self, number: int) -> Any:
        file = self._open()
        try:
            return file.read_row_group(number, columns=self._columns, use_threads=False)
        except Exception as error:  # a damaged file makes its reader raise nearly anything
            raise ValueError(f"{self.path}, row group {number}: cannot be read: {error}") from None

    def _open(self) -> Any:
        if self._process != os.getpid():  # a data worker opens the file itself
            try:
                from pyarrow import ArrowException
                from pyarrow.parquet import ParquetFile
            except ImportError:
                raise ValueError(f"{self.path} needs pyarrow: pip install -r parquet-requirements.txt") from None
            status = self.path.stat()
            if self._stamp not in (None, (status.st_size, status.st_mtime_ns)):
                raise ValueError(f"{self.path} has changed since it was opened; start again")
            self._stamp = status.st_size, status.st_mtime_ns
            try:
                self._file = ParquetFile(self.path)
            except ArrowException as error:
                raise ValueError(f"{self.path} is not a valid Parquet file: {error}") from None
            self._process = os.getpid()
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_process": 0, "_file": None, "_group": (-1, None)}


def _without_null_texts(row: dict[str, Any]) -> dict[str, Any]:
    """Leave out columns of captions that do not hold for a row: of one turn or several."""
    return {name: value for name, value in row.items() if value is not None or name not in ("q", "a", "turns")}
