"""Turn annotation files into the two files that training reads.

    python dataprocess/process_image.py [--config FILE] [--check_images] [--allow_links]

Runs from any folder. Without ``--config`` it reads the ``config.yaml`` beside this script; relative paths in a
configuration count from the configuration's own folder. A table of what was written and what was left out goes to
stdout, everything else to stderr. Exit code 0, or 2 with one message if the configuration or a whole file is at fault;
then nothing was written.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataprocess import ai_challenger, llava
from dataprocess.checking import ImageChecker
from dataprocess.config import Config, Source, load_config
from dataprocess.messages import shorten
from dataprocess.records import DataError, RecordError, Sample, read_records
from dataprocess.reporting import Counts, table
from dataprocess.writing import Outputs

log = logging.getLogger("process_image")
_BATCH = 256  # records whose images are opened together, and between two steps of the progress bar

_Item = tuple[int, Any, Sample | RecordError]  # record's index, its image name(s) as they stand, what became of it


def process(config: Config, check_images: bool = False, allow_links: bool = False) -> list[Counts]:
    """Read all sources and write the outputs, whole or not at all.

    IDs count all records of all sources from 0, rejected ones included, so that leaving one out renumbers nobody.

    Args:
        config: what to read and write.
        check_images: open every image, and leave out samples whose images cannot be used.
        allow_links: with ``check_images``, accept links that lead out of the image folder.

    Returns:
        The counts of each source.

    Raises:
        DataError: a label file is unusable as a whole, an output cannot be written, or no sample would be left.
    """
    all_counts: list[Counts] = []
    next_id = 0
    with Outputs(config) as outputs, contextlib.ExitStack() as stack:
        checker = stack.enter_context(ImageChecker(allow_links)) if check_images else None
        for source in config.sources:
            counts = Counts(source)
            all_counts.append(counts)
            with contextlib.closing(_items(source, config.seed, checker)) as items:  # ends the progress bar's line
                for item in items:
                    _write(item, next_id, outputs, counts)
                    next_id += 1
        if not any(counts.samples for counts in all_counts):
            raise DataError(f"no sample is left, so nothing was written:\n{table(all_counts)}".rstrip())
    return all_counts


def _write(item: _Item, sample_id: int, outputs: Outputs, counts: Counts) -> None:
    index, image, outcome = item
    counts.records += 1
    if isinstance(outcome, RecordError):
        counts.rejects[outcome.reason] += 1
        outputs.reject(counts.source, index, image, outcome)
        return
    counts.samples += 1
    counts.images.update(outcome.images)
    outputs.add(counts.source, index, sample_id, outcome)
    for left_out in outcome.left_out:
        counts.left_out[left_out.reason] += 1
        outputs.reject(counts.source, index, image, left_out, left_out.position)


def _items(source: Source, seed: int, checker: ImageChecker | None) -> Generator[_Item, None, None]:
    """Parse a source's records, and open their images if there is a checker, in the file's order."""
    records = iter(read_records(source.label_file))
    layout = "{desc}: {percentage:3.0f}%|{bar}|{postfix} [{elapsed}<{remaining}]"
    with tqdm(total=1.0, desc=source.name, bar_format=layout, mininterval=0.5) as progress:
        while batch := list(islice(records, _BATCH)):
            items = [(index, _image_of(record), _parse(source, record, index, seed)) for index, _, record in batch]
            yield from items if checker is None else _checked(items, source, checker)
            progress.set_postfix_str(f"{items[-1][0] + 1:,} records", refresh=False)
            progress.update(batch[-1][1] - progress.n)
        progress.update(1.0 - progress.n)


def _parse(source: Source, record: Any, index: int, seed: int) -> Sample | RecordError:
    try:
        return ai_challenger.parse(record, index, seed) if source.kind == "ai_challenger" else llava.parse(record)
    except RecordError as error:
        return error


def _checked(items: Iterable[_Item], source: Source, checker: ImageChecker) -> Iterator[_Item]:
    items = list(items)
    problems = checker.check(
        source.image_path, [() if isinstance(outcome, RecordError) else outcome.images for _, _, outcome in items]
    )
    for (index, image, outcome), problem in zip(items, problems, strict=True):
        yield index, image, problem or outcome


def _image_of(record: Any) -> Any:
    """Give a record's image name as it stands, for the list of rejects, as far as that makes sense."""
    image = record.get("image_id", record.get("image")) if isinstance(record, dict) else None
    return image if image is None or (isinstance(image, str) and len(image) < 200) else shorten(image, 200)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    default = Path(__file__).resolve().parent / "config.yaml"
    parser.add_argument("--config", type=Path, default=default, metavar="FILE", help=f"YAML (default: {default})")
    parser.add_argument("--check_images", action="store_true", help="open every image; leave out and list bad ones")
    parser.add_argument("--allow_links", action="store_true", help="let checked images be links out of their folder")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    try:
        config = load_config(args.config, need_images=args.check_images)
        for folder in sorted({source.image_path for source in config.sources}):
            if not Path(folder).is_dir():
                log.warning("%s: no such folder yet; training will look for the images there", folder)
        counts = process(config, args.check_images, args.allow_links)
    except DataError as error:
        sys.stderr.write(f"process_image: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("process_image: interrupted; earlier output files are as they were\n")
        return 130
    sys.stdout.write(table(counts))
    log.info("image map: %s", config.output_image_map)
    log.info("captions:  %s", config.output_captions)
    log.info("left out:  %s", config.output_rejects)
    return 0


def _terminate(*_: object) -> None:
    sys.exit(143)  # unwinds, so that temporary files go


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())
