"""Files of rows, JSON lines or Parquet: read once from the start, then row by row, in any order."""

from __future__ import annotations

import codecs
import json
import os
import stat
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .annotations import refuse_repeated_keys, short

MOST_GROUP_BYTES = 16 * 2**20
"""Size of the largest row group of a Parquet file: for each sample, a whole group is decoded."""
_COLUMNS = ("key", "image_file", "iamge_file", "ID", "path", "q", "a", "turns")


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


class JsonLines:
    """A file with a JSON object in each line. Iterating over it, from the start, finds out where the rows are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None  # in this process
        self._ends = array("q", [0])  # (rows + 1,) bytes
        status = os.fstat(self._open())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: a regular file was expected, because it is read sample by sample")
        self._stamp = status.st_size, status.st_mtime_ns

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

    def in_order(self, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Read rows one after the other, quickest in the order of the file."""
        with self.path.open("rb") as file:
            self._refuse_change(os.fstat(file.fileno()))
            for row in rows:
                start, end = self._ends[row], self._ends[row + 1]
                if file.tell() != start:
                    file.seek(start)
                yield self._decode(file.read(end - start), f"row {row + 1}")

    def __getitem__(self, row: int) -> dict[str, Any]:
        start, end = self._ends[row], self._ends[row + 1]
        self._refuse_change(os.fstat(self._open()))
        return self._decode(os.pread(self._open(), end - start, start), f"row {row + 1}")

    def _decode(self, line: bytes, where: str) -> dict[str, Any]:
        try:
            text = line.decode().strip(_BLANKS)
            value, end = _decode_json(text)  # `json.loads` would search for blanks, which takes longer than decoding
            if end < len(text):
                raise json.JSONDecodeError("Extra data", text, end)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}, {where}: no valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError(f"{self.path}, {where}: a JSON object was expected, got {short(value)}")
        return value

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not wait
        return self._descriptor

    def _refuse_change(self, status: os.stat_result) -> None:
        if (status.st_size, status.st_mtime_ns) != self._stamp:
            raise ValueError(f"{self.path} has changed since it was opened; start again")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_descriptor": None}  # a process that is not forked opens the file itself

    def __del__(self) -> None:
        if vars(self).get("_descriptor") is not None:
            os.close(self._open())


_decode_json = json.JSONDecoder(object_pairs_hook=refuse_repeated_keys).raw_decode
_BLANKS = " \t\r\n"


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

    def in_order(self, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Read rows one after the other, quickest in the order of the file."""
        decoded, group = -1, []
        for row in rows:
            number = int(self._starts.searchsorted(row, side="right")) - 1
            if decoded != number:
                decoded, group = number, self._read_group(number).to_pylist()
            yield _without_null_texts(group[row - int(self._starts[number])])

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
