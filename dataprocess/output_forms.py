"""The forms of the image map and the captions: JSON, JSON lines or Parquet, by the ending of the file's name.

Each is written while the samples come in, and holds at most a row group in memory.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any, BinaryIO

from .records import DataError

ROWS = 1000
"""Samples of a row group: to read one sample, a whole group is decoded."""
_encode = json.JSONEncoder(ensure_ascii=False).encode


class Form:
    """Writes entries into a stream; `name` is that of the field which holds their keys."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.stream = stream
        self.name = name
        self.num_entries = 0

    def add(self, key: str | int, value: dict[str, Any]) -> None:
        """Write one entry."""
        raise NotImplementedError

    def finish(self) -> None:
        """Write what is left."""

    def close(self) -> None:
        """Let go of the stream, before it is closed; the file may be incomplete."""


class JsonObject(Form):
    """`{key: value, …}`, an entry a line."""

    def add(self, key: str | int, value: dict[str, Any]) -> None:
        """Write one entry."""
        start = ",\n" if self.num_entries else "{\n"
        self.stream.write(f"{start}{_encode(str(key))}: {_encode(value)}".encode())
        self.num_entries += 1

    def finish(self) -> None:
        """Write what is left."""
        self.stream.write(b"\n}\n" if self.num_entries else b"{}\n")


class JsonLines(Form):
    """`{name: key, …value}` in each line."""

    def add(self, key: str | int, value: dict[str, Any]) -> None:
        """Write one entry."""
        self.stream.write(f"{_encode({self.name: key, **value})}\n".encode())


class ParquetTable(Form):
    """A row for each entry; one image is a list of one, a question with its answers is a list of one turn."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        super().__init__(stream, name)
        try:
            import pyarrow as pa
            from pyarrow.parquet import ParquetWriter
        except ImportError:
            raise DataError("an output in Parquet needs pyarrow: pip install -r parquet-requirements.txt") from None
        turn = pa.struct([("q", pa.string()), ("a", pa.list_(pa.string()))])
        images = [("image_file", pa.list_(pa.string())), ("ID", pa.int64()), ("path", pa.string())]
        columns = [("key", pa.string()), *images] if name == "key" else [("ID", pa.int64()), ("turns", pa.list_(turn))]
        self.rows: list[dict[str, Any]] = []
        self._make = pa.RecordBatch.from_pylist
        self._schema = pa.schema(columns)
        self._writer = ParquetWriter(stream, self._schema, compression="zstd")

    def add(self, key: str | int, value: dict[str, Any]) -> None:
        """Write one entry."""
        row: dict[str, Any] = {self.name: key, **value}
        if isinstance(row.get("image_file"), str):
            row["image_file"] = [row["image_file"]]
        if self.name == "ID":
            turns = value.get("turns", [value])
            row["turns"] = [turn | {"a": [turn["a"]] if isinstance(turn["a"], str) else turn["a"]} for turn in turns]
        self.rows.append(row)
        if len(self.rows) == ROWS:
            self._flush()

    def finish(self) -> None:
        """Write what is left."""
        self._flush()
        self._writer.close()

    def close(self) -> None:
        """Let go of the stream, before it is closed; the file may be incomplete."""
        with contextlib.suppress(OSError):
            self._writer.close()

    def _flush(self) -> None:
        if self.rows:
            self._writer.write_batch(self._make(self.rows, schema=self._schema), row_group_size=ROWS)
            self.rows = []


def form_of(suffix: str) -> type[Form]:
    """Return the form that an ending stands for; JSON if it is no other."""
    forms: dict[str, type[Form]] = {".jsonl": JsonLines, ".parquet": ParquetTable}
    return forms.get(suffix.lower(), JsonObject)
