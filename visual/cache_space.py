"""How much room features take on the disk, and what is there, told without the tower."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from visual.feature_cache import DTYPES, NOTE, FeatureCache


@dataclass(frozen=True)
class CacheSpace:
    """The disk that a cache lies on."""

    place: Path
    """The cache's folder, or the nearest one above it that is there already."""
    each: int
    """Bytes that one picture's features take, in whole blocks of the file system."""
    free: int
    """Bytes that are free."""


def space_for(cache: FeatureCache) -> CacheSpace:
    """Look at the disk that a cache lies on, or will."""
    place = next(folder for folder in (cache.folder, *cache.folder.parents) if folder.is_dir())
    block = os.statvfs(place).f_frsize
    return CacheSpace(place, -(-cache.file_bytes // block) * block, shutil.disk_usage(place).free)


def stored_before(directory: str | os.PathLike[str], tower: str, shape: tuple[int, int], dtype: str) -> dict[str, int]:
    """How many pictures are stored of towers of a name and shape, for each folder of the cache.

    Weights, precision and image transform may differ: only the loaded tower tells which of them are its own.

    Args:
        directory: as `--feature_cache` names it; it need not exist.
        tower: the tower's name, as it was given when they were stored.
        shape: (T, D), tokens and width of the tower.
        dtype: a name in `DTYPES`.
    """
    found: dict[str, int] = {}
    for note in sorted(Path(directory).glob(f"*/{NOTE}")):
        try:
            said = json.loads(note.read_text(encoding="utf-8"))
            same = (said["tower"], tuple(said["shape"]), said["dtype"]) == (tower, shape, dtype)
        except (OSError, ValueError, KeyError, TypeError):  # a note is for people; without it, nothing is known
            continue
        if same:
            found[note.parent.name] = len(FeatureCache(note.parent, shape, DTYPES[dtype]))
    return found


def in_gb(number: int) -> str:
    """Bytes for people, in powers of ten, as disks are sold."""
    return f"{number / 1e9:,.2f} GB" if number >= 1e7 else f"{number:,} bytes"
