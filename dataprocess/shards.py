"""Pictures in tar shards: how an image map names them, and how they are read. `shard_writing.py` writes them.

An image map names a picture by its place: `shard-000000.tar/000000012.jpg:1536:52344:1a2b3c4d` is the member
000000012.jpg, whose 52,344 bytes start at byte 1,536 of the shard and have this CRC-32. So reading keeps no index in
memory and makes one `os.pread`, and a damaged or replaced shard is noticed, whatever the picture's format.
"""

from __future__ import annotations

import functools
import os
import re
import stat
import zlib

OPEN_SHARDS = 64
"""Shards that a process keeps open: opening a file on a network mount costs a round trip or two."""
_PLACE = re.compile(r"(.+\.tar)/([^/]+):([0-9]{1,15}):([0-9]{1,15}):([0-9a-f]{8})", re.DOTALL)
_DAMAGED = "image cut short or damaged"


class ShardError(Exception):
    """A picture that its shard does not hold: `reason` is a short text to count by, `detail` shows what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def name_of_place(shard: str, member: str, offset: int, data: bytes) -> str:
    """Return the name of a picture whose bytes start at an offset of a shard."""
    return f"{shard}/{member}:{offset}:{len(data)}:{zlib.crc32(data):08x}"


def read_member(path: str, most_bytes: int) -> bytes | None:
    """Read a picture that is stored in a shard; None if this is no name of such a place.

    Raises:
        ShardError: the shard is missing, unreadable, or no longer holds these bytes at this place, or the picture has
            more than `most_bytes`.
    """
    place = _PLACE.fullmatch(path)
    if place is None:
        return None
    shard, offset, size = place[1], int(place[3]), int(place[4])
    if size > most_bytes:
        raise ShardError("image too large", f"{size:,} bytes; at most {most_bytes:,} are accepted")
    try:
        status = os.stat(shard)  # noqa: PTH116
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device could wait for ever
            raise ShardError("not a regular file", "the shard")
        data = _open_shard(shard, status.st_dev, status.st_ino).read(offset, size)
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError("missing", "no such shard") from None
    except (OSError, ValueError) as exc:  # ValueError: NUL, or characters that no file name can hold
        raise ShardError("unreadable", getattr(exc, "strerror", None) or str(exc)) from None
    if len(data) < size:
        raise ShardError(_DAMAGED, f"the shard ends at byte {status.st_size:,}, before the picture does")
    if (found := f"{zlib.crc32(data):08x}") != place[5]:
        raise ShardError(_DAMAGED, f"checksum {found}: the shard is damaged, or was replaced; write it again")
    return data


class _Descriptor:
    """An open file that has no position, so that forked data workers and threads may share it."""

    def __init__(self, path: str) -> None:
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            os.close(self._number)

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes, or fewer where the file ends."""
        data = os.pread(self._number, size, offset)
        while len(data) < size and (more := os.pread(self._number, size - len(data), offset + len(data))):
            data += more
        return data


@functools.lru_cache(maxsize=OPEN_SHARDS)
def _open_shard(path: str, device: int, inode: int) -> _Descriptor:
    """Open a shard; another file that takes its name meanwhile is opened anew."""
    return _Descriptor(path)
