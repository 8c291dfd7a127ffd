"""Let a frozen tower see every image of a data set once, before training, and keep what it makes of them.

    python visual/cache_features.py --image_map data/image_map_b.json --feature_cache data/features

`train.py --feature_cache` reads them back. What is there already is left alone, so the command may be stopped and run
again at any time. With `--num_shards N`, N processes (a GPU each, say) take a part each, `--shard 0` to `N - 1`.

Everything is said on stderr. Exit code 0: every image is stored, but for those that are listed as bad (they can't be
used, or their features are not finite or too large for the dtype); 1: the disk was full, or all images are bad; 2:
something in the command or the files is wrong, and nothing was done; 130 and 143: stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataprocess.image_io import ImageError, load_image, resolve_image_path
from dataprocess.messages import format_count
from dataset.annotations import images_of
from model.checkpoints.base_models import drops_first_patch
from model.checkpoints.checkpoint import read_checkpoint
from model.console import OneLineErrors, in_one_line, is_out_of_memory, out_of_memory, set_up_logging
from model.device import parse_dtype, pick_device, pick_dtype
from model.runs.data_workers import with_calm_workers
from visual import VisionTower, build_vision_tower
from visual.cache_space import in_gb, space_for
from visual.feature_cache import DTYPES, FeatureCache, open_feature_cache

logger = logging.getLogger("visual.cache_features")


class Terminated(BaseException):
    """SIGTERM has come."""


@dataclass(frozen=True)
class Looked:
    """What a data worker made of one image."""

    key: bytes = b""
    """Hash of its content."""
    pixels: NDArray[np.float32] | None = None
    """(3, H, W); None if its features are there already. No tensor: a worker would hand it over by a thread of its own,
    which complains where the program is stopped."""
    problem: str = ""
    """Why it can't be used, or an empty string."""
    path: str = ""
    """Where it lies, if it was opened."""


class Images(Dataset[Looked]):
    """Pictures of which the features are missing, ready for the tower.

    Args:
        names: (folder, name) of each.
        cache: what is there.
        transform: the tower's own; None: only look what is there, and open no picture.
        allow_links: follow links that lead out of an image folder.
    """

    def __init__(self, names: list[tuple[str, str]], cache: FeatureCache, transform: Any, allow_links: bool) -> None:
        self.names = names
        self.cache = cache
        self.transform = transform
        self.allow_links = allow_links

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Looked:
        try:
            path = resolve_image_path(*self.names[index], self.allow_links)
            key = self.cache.key_of(path)
            if key is not None and self.cache.has(key):
                return Looked(key)
            if self.transform is None:
                return Looked(problem="missing")
            pixels = self.transform(load_image(path))
            if key is None or key != self.cache.key_of(path):
                return Looked(problem=f"'{path}': it changed while it was read, or is too large to be looked up")
            return Looked(key, pixels.numpy(), path=str(path))
        except ImageError as error:
            return Looked(problem=str(error))


def as_it_is(items: list[Looked]) -> list[Looked]:
    """Collate nothing."""
    return items


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ValueError: for flags that do not exist, and for values that are impossible.
    """
    parser = OneLineErrors(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    text = {"image_map": "image_map.json, one or several", "feature_cache": "folder in which features are kept"}
    parser.add_argument("--image_map", nargs="+", required=True, metavar="FILE", help=text["image_map"])
    parser.add_argument("--feature_cache", required=True, metavar="DIR", help=text["feature_cache"])
    parser.add_argument(
        "--base_value_model", default="openai/clip-vit-large-patch14", help="hub name or folder of the vision tower"
    )
    parser.add_argument(
        "--previous_lora_weights",
        metavar="DIR",
        help="checkpoint that training starts from, as training has it: those of the original project, and what was "
        "trained on from them, have no use for SigLIP's first patch",
    )
    parser.add_argument(
        "--feature_cache_dtype", default="bfloat16", choices=list(DTYPES), help="stored in; as training"
    )
    parser.add_argument("--dtype", help="of the tower, as training has it: float32, bfloat16, float16")
    parser.add_argument("--device", help="cpu, cuda, cuda:0, …")
    parser.add_argument("--batch_size", type=int, default=32, help="images that go through the tower together")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that open images; 0: this one")
    parser.add_argument("--num_shards", type=int, default=1, help="how many processes share the work")
    parser.add_argument("--shard", type=int, default=0, help="which part this one takes, from 0")
    parser.add_argument("--allow_links", action="store_true", help="follow links that lead out of the image folder")
    parser.add_argument("--skip_space_check", action="store_true", help="begin even if the disk looks too small")
    args = parser.parse_args(argv)
    least = {"batch_size": 1, "num_workers": 0, "num_shards": 1, "shard": 0}
    wrong = [f"--{name} {getattr(args, name)}: at least {n}" for name, n in least.items() if getattr(args, name) < n]
    if args.shard >= args.num_shards >= 1:
        wrong.append(
            f"--shard {args.shard}: with --num_shards {args.num_shards} it goes from 0 to {args.num_shards - 1}"
        )
    if wrong:
        raise ValueError("; ".join(wrong))
    return args


def list_images(image_maps: Sequence[str]) -> tuple[list[tuple[str, str]], int]:
    """(folder, name) of every image, once, and how many entries can't be used; those are logged.

    Raises:
        ValueError: a file can't be read, or there is no image in all of them.
    """
    images: dict[tuple[str, str], None] = {}
    num_bad = 0
    for image_map in image_maps:
        found, errors = images_of(image_map)
        images.update(dict.fromkeys(found))
        num_bad += len(errors)
        for error in errors:
            logger.warning("bad: %s", error)
    if not images:
        raise ValueError(f"{' '.join(image_maps)}: there are no images; dataprocess/process_image.py writes image maps")
    return list(images), num_bad


def check_space(cache: FeatureCache, names: list[tuple[str, str]], args: argparse.Namespace) -> None:
    """Say how much there is to store at most, and on how much room.

    Where that is too little, and some of it is there already, the images are hashed to know what is missing.

    Raises:
        ValueError: if it will not fit.
    """
    space, there = space_for(cache), len(cache)
    tokens, width = cache.shape
    logger.info(
        "%s, %s × %s %s each: at most %s on the disk; %s stored already, %s free in %s",
        *(format_count(len(names), "image"), tokens, width, args.feature_cache_dtype, in_gb(len(names) * space.each)),
        *(f"{there:,}", in_gb(space.free), space.place),
    )
    missing = len(names)
    if missing * space.each <= space.free or args.skip_space_check:
        return
    if there:
        looked = loader(Images(names, cache, None, args.allow_links), args)
        with tqdm(total=len(names), desc="looking for what is there", mininterval=0.5) as bar:
            missing = sum(count_missing(items, bar) for items in looked)
    if missing * space.each > space.free:
        raise ValueError(
            f"--feature_cache {args.feature_cache}: {format_count(missing, 'image')} to be stored will take "
            f"{in_gb(missing * space.each)}, and {in_gb(space.free)} are free; make room, give another "
            "folder, or say --skip_space_check"
        )


def count_missing(items: list[Looked], bar: Any) -> int:
    """How many of a batch's images are not stored."""
    bar.update(len(items))
    return sum(bool(item.problem) for item in items)


def loader(images: Images, args: argparse.Namespace) -> Any:
    """Batches of what workers make of images, in order."""
    return with_calm_workers(
        DataLoader(images, batch_size=args.batch_size, num_workers=args.num_workers, collate_fn=as_it_is)
    )


@torch.no_grad()
def fill(tower: VisionTower, cache: FeatureCache, names: list[tuple[str, str]], args: argparse.Namespace) -> int:
    """Store the features of all images that are missing.

    Returns:
        How many images are bad; each is logged. `cache.failure` says if the disk was full.
    """
    images = Images(names, cache, tower.image_transform, args.allow_links)
    device, dtype = tower.model.device, tower.model.dtype
    num_bad = 0
    with logging_redirect_tqdm(), tqdm(total=len(names), desc="images", unit="", mininterval=0.5) as bar:
        for items in loader(images, args):
            for item in items:
                if item.problem:
                    num_bad += 1
                    logger.warning("bad: %s", item.problem)
            fresh = [item for item in items if item.pixels is not None]
            if fresh:
                keys = np.stack([np.frombuffer(item.key, np.uint8) for item in fresh])
                pixels = torch.stack([torch.from_numpy(item.pixels) for item in fresh if item.pixels is not None])
                # As train.py runs it: under autocast where the weights are of half precision.
                with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                    cache.remember(tower(pixels), keys)
                for item in fresh:
                    if item.key in cache.misfits:
                        num_bad += 1
                        logger.warning("bad: '%s': %s", item.path, cache.misfits[item.key])
            bar.update(len(items))
            if cache.failure:
                break
    return num_bad


def run(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code.

    Raises:
        ValueError: for whatever the user can mend; the message says how.
        OSError: for files that are missing or can't be read.
    """
    device = pick_device(args.device)
    dtype = parse_dtype(args.dtype) if args.dtype else pick_dtype(device)
    names, num_bad = list_images(args.image_map)
    previous = read_checkpoint(args.previous_lora_weights) if args.previous_lora_weights is not None else None
    drop = drops_first_patch(previous, args.base_value_model)
    tower = build_vision_tower(args.base_value_model, dtype, drop_first_patch=drop).to(device)
    cache = open_feature_cache(args.feature_cache, tower, args.feature_cache_dtype)
    check_space(cache, names, args)
    part = names[args.shard :: args.num_shards]
    num_unusable = fill(tower, cache, part, args)
    if cache.failure:
        logger.error(
            "cache_features.py: %s of %s images were stored, then the disk failed (%s); what is stored can be used, "
            "and the same command goes on from there",
            *(f"{cache.num_stored:,}", f"{len(part):,}", cache.failure),
        )
        return 1
    logger.info(
        "%s: %s stored now, %s were there, %s bad; %s stored in all",
        format_count(len(part), "image"),
        *(f"{number:,}" for number in (cache.num_stored, len(part) - cache.num_stored - num_unusable)),
        *(f"{number:,}" for number in (num_unusable + num_bad, len(cache))),
    )
    return int(num_unusable == len(part) > 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring.

    Returns:
        The exit code.
    """
    set_up_logging()
    try:
        return run(parse_arguments(argv))
    except (KeyboardInterrupt, Terminated) as error:
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        logger.error(
            "cache_features.py: stopped by %s; what is stored can be used, the same command goes on", number.name
        )
        return 128 + number
    except (ValueError, OSError, ImportError) as error:
        logger.error("cache_features.py: %s", in_one_line(error))
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        logger.error("cache_features.py: %s", out_of_memory(error, "lower --batch_size, which changes no feature"))
        return 1


def _terminate(*_: object) -> None:
    # Nothing is logged in here: the signal may have come while the log, or the progress bar, was being written.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))  # a second one quits at once
    raise Terminated  # unwinds, so that the file being written goes


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())
