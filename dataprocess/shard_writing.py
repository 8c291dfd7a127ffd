"""Copy pictures into tar shards.

    DIR/shard-000000.tar   pictures, byte for byte as their files are; `tar` and WebDataset read it
    DIR/index.jsonl        {"shard", "member", "offset", "size", "crc32", "path", "image_file"}: a line for each picture

The index is for people and other programs: in the image map, each picture's name says where it is (`shards.py`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from .image_bytes import read_image
from .image_io import ImageError, resolve_image_path
from .messages import format_count
from .records import DataError, RecordError, Sample
from .shards import name_of_place
from .writing import NewFile, Outputs, naming

SHARD_BYTES = 1_000_000_000
"""Size of the largest shard, unless `--shard_bytes` says otherwise."""
INDEX = "index.jsonl"
_BLOCK = 512
"""A tar file is made of blocks of so many bytes."""
_END = bytes(2 * _BLOCK)
_SHARD = re.compile(r"shard-[0-9]{6,}\.tar")
_LEFT_BY_A_KILL = re.compile(r"\.(shard-[0-9]{6,}\.tar|index\.jsonl)\.[0-9a-f]{8}\.(new|old)")
_EXTENSION = re.compile(r"\.[A-Za-z0-9]{1,10}")


class ShardWriter:
    """Copies pictures into shards, each picture once, in the order of the samples.

    Args:
        outputs: the outputs of the same run; shards appear together with them, or not at all.
        folder: of the shards; it is made if need be, and other processes are kept out of it.
        most_bytes: size of the largest shard; a larger picture gets one of its own.
        allow_links: accept links that lead out of the image folder.

    Raises:
        DataError: the folder holds something else than shards of ours, belongs to another process, or cannot be made.
    """

    def __init__(self, outputs: Outputs, folder: Path, most_bytes: int, allow_links: bool) -> None:
        self.folder = folder.absolute()
        self.most_bytes = most_bytes
        self.allow_links = allow_links
        self.num_shards = 0
        self._outputs = outputs
        self._names: dict[tuple[str, str], str] = {}
        """The place of each picture, by its folder and normalised name."""
        self._shard: NewFile | None = None
        self._size = 0  # of the shard that is being written, so far
        outputs.take_folder(self.folder)
        with naming(self.folder):
            files = sorted(self.folder.iterdir())
            for left in (file for file in files if _LEFT_BY_A_KILL.fullmatch(file.name)):
                left.unlink()
        other = next((file.name for file in files if not file.name.startswith(".")), None)
        if other is not None and not (self.folder / INDEX).is_file():
            raise DataError(f"--shards {folder}: it holds {other} but no {INDEX}; give a new or an empty folder")
        self._earlier = [file for file in files if _SHARD.fullmatch(file.name)]
        self._index = outputs.new_file(self.folder / INDEX)

    def store(self, root: str, outcomes: Sequence[Sample | RecordError]) -> list[Sample | RecordError]:
        """Copy the samples' pictures, and note where; replace each sample that has an unreadable one by the reason.

        Args:
            root: the folder of the pictures.
            outcomes: samples, or why there is none.

        Raises:
            DataError: a shard cannot be written.
        """
        return [self._store(root, outcome) if isinstance(outcome, Sample) else outcome for outcome in outcomes]

    def _store(self, root: str, sample: Sample) -> Sample | RecordError:
        keys = [(root, os.path.normpath(name)) for name in sample.images]
        try:  # all are read before the first is copied
            fresh = {
                key: read_image(resolve_image_path(root, name, self.allow_links))
                for key, name in zip(keys, sample.images, strict=True)
                if key not in self._names
            }
        except ImageError as error:
            return RecordError(error.reason, str(error))
        for key, data in fresh.items():
            self._names[key] = self._add(key, data)
        return dataclasses.replace(sample, copies=(str(self.folder), tuple(self._names[key] for key in keys)))

    def finish(self) -> None:
        """End the last shard; those of an earlier, larger run are deleted when the new ones are in place."""
        self._end_shard()
        files = self._outputs.files
        files.remove(self._index)
        files.append(self._index)  # moved away last and put in place first: where there is a shard, there is an index
        written = {file.target.name for file in files}
        self._outputs.surplus += [file for file in self._earlier if file.name not in written]

    def _add(self, key: tuple[str, str], data: bytes) -> str:
        info = tarfile.TarInfo(f"{len(self._names):09d}{_extension(key[1])}")
        info.size = len(data)  # time, owner and group stay 0: the same pictures give the same bytes
        padding = bytes(-len(data) % _BLOCK)
        needed = _BLOCK + len(data) + len(padding)
        if self._shard is None or self._size + needed + len(_END) > self.most_bytes:
            self._end_shard()
            self._shard = self._outputs.new_file(self.folder / f"shard-{self.num_shards:06d}.tar")
            self._size = 0
            self.num_shards += 1
        for part in (info.tobuf(tarfile.USTAR_FORMAT), data, padding):
            self._shard.write(part)
        shard, offset = self._shard.target.name, self._size + _BLOCK
        self._size += needed
        line = {"shard": shard, "member": info.name, "offset": offset, "size": len(data)}
        line |= {"crc32": f"{zlib.crc32(data):08x}", "path": key[0], "image_file": key[1]}
        self._index.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode())
        return name_of_place(shard, info.name, offset, data)

    def _end_shard(self) -> None:
        if self._shard is not None:
            self._shard.write(_END)
            self._shard.close()

    def __str__(self) -> str:
        return f"{format_count(len(self._names), 'picture')} in {format_count(self.num_shards, 'shard')}: {self.folder}"


def _extension(name: str) -> str:
    """Return a picture's extension; WebDataset takes the name before the first dot for the sample's."""
    extension = os.path.splitext(name)[1]  # noqa: PTH122
    return extension if _EXTENSION.fullmatch(extension) else ".img"
