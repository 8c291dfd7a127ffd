"""Turn annotation files into the two files that training reads.

    python dataprocess/process_image.py [--config FILE] [--check_images] [--allow_links] [--shards DIR]

Runs from any folder. Without `--config` it reads the `config.yaml` next to this script; relative paths in a
configuration start from the configuration's own folder. A table of what was written and what was left out goes to
stdout, everything else to stderr. Exit code 0, or 2 with one message if the configuration or a whole file is at fault;
then nothing was written.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataprocess import ai_challenger, llava
from dataprocess.config import Config, Source, load_config
from dataprocess.image_io import ImageError, load_image, resolve_image_path
from dataprocess.messages import shorten
from dataprocess.records import DataError, Record, RecordError, Sample, read_records
from dataprocess.shard_writing import SHARD_BYTES, ShardWriter
from dataprocess.writing import Counts, open_outputs, table

log = logging.getLogger("process_image")
_BATCH = 256  # records whose images are opened together, and between two steps of the progress bar
_BAR = "{desc}: {percentage:3.0f}%|{bar}|{postfix} [{elapsed}<{remaining}]"


def process(
    config: Config,
    check_images: bool = False,
    allow_links: bool = False,
    shards: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Counts]:
    """Read all sources and write the outputs, whole or not at all; return the counts of each source.

    IDs count all records of all sources from 0, rejected ones included, so that leaving one out renumbers no other.

    Args:
        config: what to read and write.
        check_images: open every image, and leave out samples whose images cannot be used.
        allow_links: with `check_images` or `shards`, accept links that lead out of the image folder.
        shards: a folder; copy the pictures into tar files there, and leave out samples whose pictures cannot be read.
        shard_bytes: the size of the largest of these.

    Raises:
        DataError: a label file is unusable as a whole, an output cannot be written, or no sample would be left.
    """
    all_counts = [Counts(source) for source in config.sources]
    next_id = 0
    with open_outputs(config) as outputs, ThreadPoolExecutor(os.cpu_count()) as threads:
        checker = ImageChecker(threads, allow_links)
        writer = ShardWriter(outputs, shards, shard_bytes, allow_links) if shards is not None else None
        for counts in all_counts:
            source = counts.source
            records = read_records(source.label_file)
            with tqdm(total=1.0, desc=source.name, bar_format=_BAR, mininterval=0.5) as progress:
                while batch := list(islice(records, _BATCH)):
                    outcomes = [_parse(source, record, config.seed) for record in batch]
                    if check_images:
                        outcomes = checker.check(source.image_path, outcomes)
                    if writer is not None:
                        outcomes = writer.store(source.image_path, outcomes)
                    for record, outcome in zip(batch, outcomes, strict=True):
                        outputs.write(record, next_id, outcome, counts)
                        next_id += 1
                    progress.set_postfix_str(f"{counts.records:,} records", refresh=False)
                    progress.update(batch[-1].fraction_read - progress.n)
                progress.update(1.0 - progress.n)
        if not outputs.num_samples:
            raise DataError(f"no sample is left, so nothing was written:\n{table(all_counts)}".rstrip())
        if writer is not None:
            writer.finish()
    if writer is not None:
        log.info("shards:    %s", writer)
    return all_counts


def _parse(source: Source, record: Record, seed: int) -> Sample | RecordError:
    try:
        if record.repeated_key is not None:
            raise RecordError("repeated key", shorten(record.repeated_key))
        if source.name == "ai_challenger":
            return ai_challenger.parse(record.value, record.index, seed)
        return llava.parse(record.value)
    except RecordError as error:
        return error


class ImageChecker:
    """Opens images with the function that training uses, in threads (decoders release the interpreter's lock)."""

    def __init__(self, threads: ThreadPoolExecutor, allow_links: bool) -> None:
        self._threads = threads
        self._allow_links = allow_links
        self._known: dict[tuple[str, str], RecordError | None] = {}  # each file is opened once

    def check(self, root: str, outcomes: Sequence[Sample | RecordError]) -> list[Sample | RecordError]:
        """Replace each sample that has an unusable image in the folder `root` by the reason."""
        images = [outcome.images if isinstance(outcome, Sample) else () for outcome in outcomes]
        names = dict.fromkeys(name for row in images for name in row if (root, name) not in self._known)
        for name, problem in zip(names, self._threads.map(lambda name: self._open(root, name), names), strict=True):
            self._known[root, name] = problem
        return [
            next((problem for name in row if (problem := self._known[root, name])), outcome)
            for row, outcome in zip(images, outcomes, strict=True)
        ]

    def _open(self, root: str, name: str) -> RecordError | None:
        try:
            load_image(resolve_image_path(root, name, self._allow_links))
        except ImageError as error:
            return RecordError(error.reason, str(error))
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, as the module's docstring says; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    default = Path(__file__).resolve().parent / "config.yaml"
    parser.add_argument("--config", type=Path, default=default, metavar="FILE", help=f"YAML (default: {default})")
    parser.add_argument("--check_images", action="store_true", help="open every image; leave out and list bad ones")
    parser.add_argument("--allow_links", action="store_true", help="let images be links out of their folder")
    parser.add_argument("--shards", type=Path, metavar="DIR", help="copy the pictures into tar files in this folder")
    parser.add_argument("--shard_bytes", type=int, metavar="N", help=f"size of the largest (default: {SHARD_BYTES:,})")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    try:
        if args.shard_bytes is not None and (args.shards is None or args.shard_bytes < 1):
            raise DataError(f"--shard_bytes {args.shard_bytes}: must be at least 1, and needs --shards")
        config = load_config(args.config, need_images=args.check_images or args.shards is not None)
        for folder in sorted({source.image_path for source in config.sources}):
            if not Path(folder).is_dir():
                log.warning("%s: no such folder yet; training will look for the images there", folder)
        shards = (args.shards, args.shard_bytes or SHARD_BYTES)
        counts = process(config, args.check_images, args.allow_links, *shards)
    except DataError as error:
        sys.stderr.write(f"process_image: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("process_image: interrupted\n")
        return 130
    sys.stdout.write(table(counts))
    log.info("image map: %s", config.output_image_map)
    log.info("captions:  %s", config.output_captions)
    log.info("left out:  %s", config.output_rejects)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that temporary files are deleted
    sys.exit(main())
