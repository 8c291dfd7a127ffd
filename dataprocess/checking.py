"""Opening every image with the very function that training opens it with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from dataprocess.image_io import ImageError, load_image, resolve_image_path
from dataprocess.records import RecordError


class ImageChecker:
    """Opens images in threads (the decoders release the interpreter's lock), each file once.

    A context manager, because of the threads.
    """

    def __init__(self, allow_links: bool = False) -> None:
        self._allow_links = allow_links
        self._known: dict[tuple[str, str], RecordError | None] = {}
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1)

    def __enter__(self) -> ImageChecker:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def check(self, root: str, samples: Sequence[Sequence[str]]) -> list[RecordError | None]:
        """Open the images of some samples.

        Args:
            root: the image folder.
            samples: each sample's image names.

        Returns:
            For each sample what is wrong with its first unusable image, or None.
        """
        names = dict.fromkeys(name for images in samples for name in images if (root, name) not in self._known)
        for name, problem in zip(names, self._pool.map(lambda name: self._open(root, name), names), strict=True):
            self._known[root, name] = problem
        return [
            next((problem for name in images if (problem := self._known[root, name]) is not None), None)
            for images in samples
        ]

    def _open(self, root: str, name: str) -> RecordError | None:
        try:
            load_image(resolve_image_path(root, name, self._allow_links))
        except ImageError as error:
            return RecordError(error.reason, str(error))
        return None
