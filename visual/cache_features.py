"""Let a frozen tower see every image of a data set once, before training, and keep its features.

    python visual/cache_features.py --image_map data/image_map_b.json --feature_cache data/features

`train.py --feature_cache` does the same before its first step, and then reads the features. What is stored already is
left alone, so the command may be stopped and run again at any time. With `--num_shards N`, N processes (a GPU each,
say) take a part each, `--shard 0` to `N - 1`.

Everything is said on stderr. Exit code 0: every image is stored, apart from those listed as bad; 1: the disk was full,
or all images are bad; 2: the command or a file is wrong, and nothing was done; 130, 143: stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import functools
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataprocess.messages import format_count, shorten
from dataset.annotations import find_folder, folder_and_files, read_object
from dataset.large_annotations import entries_by_key
from dataset.prompt import SampleError
from model.checkpoints.checkpoint import read_checkpoint, tower_settings
from model.console import set_up_logging
from model.device import parse_dtype, pick_device, pick_dtype
from model.errors import OneLineErrors, in_one_line, is_out_of_memory, out_of_memory
from model.export.from_llava import llava_feature_layer
from model.feature_caching.disk import lack_of_space
from model.feature_caching.fill import BATCH_SIZE, fill_feature_cache
from model.feature_caching.image_list import ImageList
from visual import build_vision_tower
from visual.feature_cache import DTYPES, open_feature_cache

logger = logging.getLogger("visual.cache_features")

HOW_TO_CONTINUE = "what is stored can be used, and the same command continues from there"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; a ValueError says what is wrong with it."""
    parser = OneLineErrors(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--image_map", nargs="+", required=True, metavar="FILE", help="image_map.json, one or several")
    add("--feature_cache", required=True, metavar="DIR", help="folder in which features are kept")
    add("--base_value_model", default="openai/clip-vit-large-patch14", help="hub name or folder of the vision tower")
    add("--previous_lora_weights", metavar="DIR", help="checkpoint that training starts from, as in training")
    add("--from_llava", metavar="DIR", help="LLaVA folder whose projector training starts from, as in training")
    add("--feature_cache_dtype", default="bfloat16", choices=list(DTYPES), help="dtype on the disk, as in training")
    add("--dtype", help="precision of the tower, as in training: float32, bfloat16, float16")
    add("--device", help="cpu, cuda, cuda:0, …")
    add("--batch_size", type=int, default=BATCH_SIZE, help="images that the tower sees together")
    add("--num_workers", type=int, default=2, help="processes that open images; 0: this one")
    add("--num_shards", type=int, default=1, help="how many processes share the work")
    add("--shard", type=int, default=0, help="the part that this process takes, from 0")
    add("--allow_links", action="store_true", help="follow links that lead out of the image folder")
    add("--skip_space_check", action="store_true", help="begin even if the disk looks too small")
    args = parser.parse_args(argv)
    for name, least in {"batch_size": 1, "num_workers": 0, "num_shards": 1, "shard": 0}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: at least {least}")
    if args.shard >= args.num_shards:
        last = args.num_shards - 1
        parser.error(f"--shard {args.shard}: with --num_shards {args.num_shards} it goes from 0 to {last}")
    if args.from_llava is not None and args.previous_lora_weights is not None:
        parser.error("--from_llava and --previous_lora_weights do not go together; leave one of them out")
    return args


def list_images(image_maps: Sequence[str], allow_links: bool) -> tuple[ImageList, list[str]]:
    """List the image files of several image maps, each once, and what is wrong with other entries."""
    bad_entries: list[str] = []

    def names() -> Iterator[tuple[str, str]]:
        for image_map in image_maps:
            folder_of = functools.cache(functools.partial(find_folder, Path(image_map), True))
            is_large = Path(image_map).suffix.lower() in (".jsonl", ".parquet")
            for key, entry in entries_by_key(image_map) if is_large else read_object(image_map).items():
                try:
                    folder, files = folder_and_files(entry, folder_of)
                except SampleError as error:
                    bad_entries.append(f"{image_map}: entry {shorten(key)}: {error}")
                else:
                    yield from ((folder, name) for name in files)

    images = ImageList(names(), allow_links)
    if not len(images):
        raise ValueError(f"{' '.join(image_maps)}: there are no images; dataprocess/process_image.py writes image maps")
    return images, bad_entries


def run(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code. A ValueError or OSError says what the user can fix."""
    device = pick_device(args.device)
    dtype = parse_dtype(args.dtype) if args.dtype else pick_dtype(device)
    images, bad_entries = list_images(args.image_map, args.allow_links)
    previous = read_checkpoint(args.previous_lora_weights) if args.previous_lora_weights is not None else None
    settings = {} if previous is None else tower_settings(previous, args.base_value_model)
    if args.from_llava is not None:
        settings = {"feature_layer": llava_feature_layer(args.from_llava, args.base_value_model)}
    tower = build_vision_tower(args.base_value_model, dtype, **settings).to(device)
    cache = open_feature_cache(args.feature_cache, tower, args.feature_cache_dtype)
    problem = lack_of_space(cache, tower, images)
    if problem and not args.skip_space_check:
        raise ValueError(
            f"--feature_cache {args.feature_cache}: {problem}; make room, or give another folder or --skip_space_check"
        )
    for bad in bad_entries:
        logger.warning("bad: %s", bad)
    part = images.share(args.shard, args.num_shards)
    filled = fill_feature_cache(tower, cache, part, batch_size=args.batch_size, num_workers=args.num_workers)
    if filled.failure:
        counts = f"{filled.num_stored:,}", f"{len(part):,}", filled.failure, HOW_TO_CONTINUE
        logger.error("cache_features.py: %s of %s images were stored, then the disk failed (%s); %s", *counts)
        return 1
    total, num_bad = len(part), filled.num_bad
    logger.info(
        "%s: %s stored now, %s were there, %s bad; %s stored in all",
        format_count(total, "image"),
        *(f"{number:,}" for number in (filled.num_stored, total - filled.num_stored - num_bad)),
        *(f"{number:,}" for number in (num_bad + len(bad_entries), cache.num_pictures())),
    )
    return int(num_bad == total > 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, as the module's docstring says; returns the exit code."""
    set_up_logging()
    try:
        return run(parse_arguments(argv))
    except KeyboardInterrupt as error:
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        logger.error("cache_features.py: stopped by %s; %s", number.name, HOW_TO_CONTINUE)
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
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one quits at once
    raise KeyboardInterrupt(signal.SIGTERM)  # unwinds, so that the file being written is removed


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())
