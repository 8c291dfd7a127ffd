"""The disk of a feature cache: how much room features take, what is free, and what is stored already."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

from tqdm import tqdm

from dataprocess.image_bytes import content_key
from dataprocess.image_io import ImageError
from dataprocess.messages import format_count
from visual.base import VisionTower
from visual.feature_cache import DTYPES, NOTE, FeatureCache

from .image_list import ImageList

logger = logging.getLogger(__name__)


def disk_space(cache: FeatureCache) -> tuple[int, int, Path]:
    """Return the bytes that a picture takes in whole blocks, those free, and the nearest folder that exists."""
    folder = next(folder for folder in (cache.folder, *cache.folder.parents) if folder.is_dir())
    block = os.statvfs(folder).f_frsize
    return -(-cache.file_bytes // block) * block, shutil.disk_usage(folder).free, folder


def pictures_stored(folder: Path, tower: str, shape: tuple[int, int], dtype: str) -> dict[str, int]:
    """Count the pictures stored for towers of a name, shape (P, D) and dtype, by folder of the cache.

    Only the loaded tower tells which of the folders is its own: weights, precision and image transform may differ.
    """
    found: dict[str, int] = {}
    for note in sorted(folder.glob(f"*/{NOTE}")):
        try:
            said = json.loads(note.read_text(encoding="utf-8"))
            same = (said["tower"], tuple(said["shape"]), said["dtype"]) == (tower, shape, dtype)
        except (OSError, ValueError, KeyError, TypeError):  # notes are for people; without one, nothing is known
            continue
        if same:
            found[note.parent.name] = FeatureCache(note.parent, shape, DTYPES[dtype]).num_pictures()
    return found


def lack_of_space(cache: FeatureCache, tower: VisionTower, images: ImageList) -> str:
    """Log how much room the pictures' features take at most, and what is free; return what is missing, or "".

    If the features of all would not fit, the pictures are hashed to see which are stored already.
    """
    (per_image, free, folder), dtype = disk_space(cache), str(cache.dtype).removeprefix("torch.")
    stored = pictures_stored(cache.folder.parent, tower.name_or_path, cache.shape, dtype)
    of_this_tower = stored.pop(cache.folder.name, 0)
    logger.info(
        "%s, %s × %s %s each: at most %s on the disk; %s stored already, %s free in %s",
        *(format_count(len(images), "image"), *cache.shape, dtype, in_gb(len(images) * per_image)),
        *(f"{of_this_tower:,}", in_gb(free), folder),
    )
    if stored:
        logger.warning(
            "%s in %s are not used: they are of other weights, precision or settings, or of an older version",
            format_count(sum(stored.values()), "picture"),
            ", ".join(str(cache.folder.parent / name) for name in stored),
        )
    missing = len(images)
    if of_this_tower and missing * per_image > free:
        every = tqdm(range(len(images)), desc="looking for stored images", mininterval=0.5)
        missing = sum(not _is_stored(cache, images, index) for index in every)
    needed = missing * per_image
    if needed <= free:
        return ""
    return f"{format_count(missing, 'image')} to be stored will take {in_gb(needed)}, and {in_gb(free)} are free"


def _is_stored(cache: FeatureCache, images: ImageList, index: int) -> bool:
    try:
        key = content_key(images[index])
    except ImageError:
        return False
    return key is not None and cache.path_of(key).is_file()


def in_gb(number: int) -> str:
    """Format bytes in powers of ten, as disks are sold."""
    return f"{number / 1e9:,.2f} GB" if number >= 1e7 else f"{number:,} bytes"
