"""The pictures of a data set, each once, without a Python object for each: ten million would take gigabytes."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from dataprocess.image_io import resolve_image_path
from dataset import ImageCaptionDataset


class ImageList:
    """Pictures in the order in which they first come, in one block of bytes that data workers share.

    Args:
        images: folder and name of each; those that come again are left out.
        allow_links: accept links that lead out of the folder.
    """

    def __init__(self, images: Iterable[tuple[str, str]], allow_links: bool) -> None:
        self.allow_links = allow_links
        packed, ends, digests = bytearray(), array("q", [0]), bytearray()
        for image in images:
            text = "\0".join(image).encode("utf-8", "surrogatepass")
            packed += text
            ends.append(len(packed))
            digests += hashlib.blake2b(text, digest_size=16).digest()
        self._packed, self._ends = packed, np.frombuffer(ends, dtype=np.int64)  # (images + 1,)
        halves = np.frombuffer(digests, dtype=np.int64).reshape(-1, 2)  # (images, 2)
        order = np.lexsort(halves.T)  # stable: of equal ones, the first comes first
        is_first = np.ones(len(order), dtype=bool)
        is_first[1:] = (halves[order[1:]] != halves[order[:-1]]).any(axis=1)
        self._rows = np.sort(order[is_first])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Path:
        """Return the file of a picture.

        Raises:
            ImageError: its name leads out of its folder.
        """
        row = self._rows[index]
        text = self._packed[self._ends[row] : self._ends[row + 1]].decode("utf-8", "surrogatepass")
        folder, _, name = text.rpartition("\0")
        return resolve_image_path(folder, name, self.allow_links)

    def share(self, number: int, of: int) -> ImageList:
        """Return one of several shares that are of equal size, but for one picture."""
        part = object.__new__(ImageList)
        vars(part).update(vars(self), _rows=self._rows[number::of])
        return part


def images_of(datasets: Sequence[ImageCaptionDataset]) -> ImageList:
    """List the pictures of data sets, which all accept links or none of them does."""
    samples = (sample for dataset in datasets for sample in dataset.annotations)
    images = ((sample.image_folder, name) for sample in samples for name in sample.image_files)
    return ImageList(images, datasets[0].allow_links)
