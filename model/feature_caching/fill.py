"""Fill a feature cache: show each picture to the frozen tower once, and store its features.

`train.py --feature_cache` does so before its first step, `visual/cache_features.py` without training. A picture whose
features are stored is left alone, so filling may be stopped and started again at any time.

Shape legend: N pictures of a batch, P tokens per image, D width of the tower.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dataprocess.image_bytes import content_key
from dataprocess.image_io import ImageError, load_image
from dataset import ImageCaptionDataset
from visual.base import ImageTransform, VisionTower
from visual.feature_cache import FeatureCache, open_feature_cache

from ..arguments import VLMTrainingArguments
from ..runs.data_workers import with_calm_workers
from ..vision_language_model import VisionLanguageModel
from .disk import lack_of_space
from .image_list import ImageList, images_of

logger = logging.getLogger(__name__)

BATCH_SIZE = 32
"""Pictures that go through the tower together."""


def complete_feature_cache(
    folder: str,
    dtype: str,
    model: VisionLanguageModel,
    datasets: Iterable[ImageCaptionDataset | None],
    args: VLMTrainingArguments,
) -> None:
    """Store the features of all pictures of the data sets, and let the data sets read them from now on.

    Each process of the run takes its share; none returns before all pictures are stored. `folder` and `dtype` are as
    `--feature_cache` and `--feature_cache_dtype` name them.

    Raises:
        ValueError: if the folder cannot be made, or the disk is too small.
        OSError: if the disk was full, or cannot be written to; what is stored stays.
    """
    cache = open_feature_cache(folder, model.vision_tower, dtype)
    used = [dataset for dataset in datasets if dataset is not None]
    images = images_of(used)
    problem = lack_of_space(cache, model.vision_tower, images) if args.process_index == 0 else ""
    if problem := "".join(gather_object([problem])):
        raise ValueError(f"--feature_cache {folder}: {problem}; make room, or give another folder")
    filled = fill_feature_cache(
        model.vision_tower,
        cache,
        images.share(args.process_index, args.world_size),
        num_workers=args.dataloader_num_workers,
        show_progress=args.process_index == 0 and not args.disable_tqdm,
    )
    if failure := next(filter(None, gather_object([filled.failure])), ""):  # waits for all processes, too
        raise OSError(f"--feature_cache {folder}: features can't be stored ({failure}); those stored are kept")
    for dataset in used:
        dataset.feature_cache = cache


@dataclass
class Filled:
    """Counts of pictures, and why filling ended early."""

    num_stored: int = 0  # now
    num_bad: int = 0  # each was logged
    failure: str = ""  # why the disk took no more, or an empty string


@torch.no_grad()
def fill_feature_cache(
    tower: VisionTower,
    cache: FeatureCache,
    images: ImageList,
    *,
    batch_size: int = BATCH_SIZE,
    num_workers: int = 0,
    show_progress: bool = True,
) -> Filled:
    """Run the tower, on its device, over the pictures whose features are missing, and store them."""
    filled = Filled()
    device, dtype = tower.model.device, tower.model.dtype
    pictures = MissingPictures(images, cache, tower.image_transform)
    loader = DataLoader(pictures, batch_size, num_workers=num_workers, collate_fn=list)
    bar = tqdm(total=len(images), desc="images", unit="", mininterval=0.5, disable=not show_progress)
    with logging_redirect_tqdm(), bar:
        for batch in with_calm_workers(loader):  # whose generator is its own: training draws the same numbers
            problems = [opened.problem for opened in batch if opened.problem]
            fresh = [opened for opened in batch if opened.pixels is not None]
            if fresh:
                pixels = torch.stack([torch.from_numpy(opened.pixels) for opened in fresh])  # (N, 3, H, W)
                # As train.py runs the tower: under autocast where its weights are of half precision.
                with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                    features = tower(pixels)  # (N, P, D)
                problems += _store(cache, fresh, features, filled)
            for problem in problems:
                logger.warning("bad: %s", problem)
            filled.num_bad += len(problems)
            bar.update(len(batch))
            if filled.failure:
                break
    return filled


@dataclass(frozen=True)
class Opened:
    """One picture, as a data worker hands it over."""

    path: Path
    key: bytes = b""
    pixels: NDArray[np.float32] | None = None  # (3, H, W); a tensor would travel by threads that complain when stopped
    problem: str = ""  # why it cannot be used, or an empty string


class MissingPictures(Dataset[Opened]):
    """Pictures for the tower, opened only if their features are missing or damaged."""

    def __init__(self, images: ImageList, cache: FeatureCache, transform: ImageTransform) -> None:
        self.images = images
        self.cache = cache
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Opened:
        try:
            path = self.images[index]
        except ImageError as error:
            return Opened(Path(), problem=str(error))
        key = content_key(path)
        if key is not None and self.cache.read(key) is not None:
            return Opened(path)
        try:
            pixels = self.transform(load_image(path))  # (3, H, W)
        except ImageError as error:
            return Opened(path, problem=str(error))
        if key is None or key != content_key(path):  # else the pixels could belong to another key
            return Opened(path, problem=f"'{path}': it changed while it was read, or is too large to be looked up")
        return Opened(path, key, pixels.numpy())


def _store(cache: FeatureCache, pictures: Sequence[Opened], features: Tensor, filled: Filled) -> list[str]:
    """Write the features (N, P, D) of a batch; count them, or a failing disk, in `filled`. Return what is wrong."""
    rounded = features.to(cache.dtype).cpu()  # (N, P, D)
    fits, finite = (one.flatten(1).isfinite().all(dim=1).tolist() for one in (rounded, features))  # (N,) each
    dtype = str(cache.dtype).removeprefix("torch.")
    problems = []
    for row, picture in enumerate(pictures):
        if fits[row]:
            try:
                cache.write(picture.key, rounded[row])
            except OSError as error:
                filled.failure = error.strerror or str(error)
                break
            filled.num_stored += 1
        elif finite[row]:
            problems.append(f"'{picture.path}': {dtype} can't hold its features; bfloat16 has a wider range")
        else:
            fault = "its features are infinite or no numbers; does the tower run in too small a dtype?"
            problems.append(f"'{picture.path}': {fault}")
    return problems
