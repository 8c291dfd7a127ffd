"""Write safetensors files, one tensor in memory at a time, and a new file where one would grow too large."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.saving import flush_to_disk

_HEADER_BYTES = 1 << 18
"""Room for the header, whose length is known last; the format allows spaces after its JSON."""
_MOST_TENSORS = 1000
"""More in one file might not fit the header."""
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def parse_size(text: str) -> int:
    """Read a size as in `5GB`, `500MB` or `2GiB`; return bytes.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]i?B)", text)
    if match is None or not float(match[1]):
        raise ValueError(f"--max_shard_size {text!r}: expected a size above 0, as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2]])


class ShardWriter:
    """`model.safetensors`, or `model-00001-of-0000N.safetensors` and an index.

    Args:
        folder: where the files go.
        max_bytes: the most bytes of tensors in a file; a larger tensor has a file to itself.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.headers: list[dict[str, Any]] = []
        self.file: Any = None

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write all tensors, and name the files.

        Raises:
            OSError: if they can't be written.
        """
        try:
            for name, tensor in tensors:
                self._add(name, tensor)
        finally:
            self._close()
        number = len(self.headers)
        names = [f"model-{i:05d}-of-{number:05d}.safetensors" for i in range(1, number + 1)]
        if number == 1:
            names = ["model.safetensors"]
        for index, name in enumerate(names):
            self._part(index).rename(self.folder / name)
            flush_to_disk(self.folder / name)
        if number > 1:
            where = {key: name for name, header in zip(names, self.headers, strict=True) for key in header}
            where.pop("__metadata__")
            index_file = {"metadata": {"total_size": sum(map(_size, self.headers))}, "weight_map": where}
            text = json.dumps(index_file, indent=2, sort_keys=True)
            (self.folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")

    def _add(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
        begin = _size(self.headers[-1]) if self.file is not None else 0
        if self.file is None or begin + len(data) > self.max_bytes or len(self.headers[-1]) > _MOST_TENSORS:
            self._close()
            self.headers.append({"__metadata__": {"format": "pt"}})
            self.file = self._part(len(self.headers) - 1).open("xb")
            self.file.write(b" " * (8 + _HEADER_BYTES))
            begin = 0
        self.file.write(data)
        entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, begin + len(data)]}
        self.headers[-1][name] = entry

    def _close(self) -> None:
        if self.file is None:
            return
        header = json.dumps(self.headers[-1]).encode()
        self.file.seek(0)
        self.file.write(_HEADER_BYTES.to_bytes(8, "little") + header.ljust(_HEADER_BYTES))
        self.file.close()
        self.file = None

    def _part(self, index: int) -> Path:
        return self.folder / f"part-{index}"


def _size(header: dict[str, Any]) -> int:
    """Return the bytes of the tensors in a file."""
    last = list(header.values())[-1]
    return int(last["data_offsets"][1]) if "data_offsets" in last else 0
