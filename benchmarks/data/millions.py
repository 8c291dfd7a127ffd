"""Image maps and captions of up to ten million samples: memory of the training processes together, and time a sample.

    python -m benchmarks.data.millions
    python -m benchmarks.data.millions --samples 100000 1000000 10000000 --forms jsonl parquet

Made-up samples are written by what `dataprocess/process_image.py` writes with, then opened as training opens them: the
data set, its order of an epoch, a data loader, two workers. Pictures do not exist, and are not opened. *Processes* is
the proportional memory (PSS) of the main process and its workers together, the largest that was seen from the opening
to the last batch; *start* is that of the process before it opens the data, with everything that training imports.
Ten million take about 12 GB of disk for both files as JSON lines. Prints a table, writes `results/millions.json` and
`.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path

from ..inputs import SEED
from ..measure import itself, parser, publish, run_once, text_table

WORKERS = 2
READS = 4000
"""Samples that the loader delivers."""
_WORDS = ("a person", "image with", "of in", "street people", "standing near", "table while", "which might", "enjoying")


# ---- In a process of its own


def write_samples(folder: Path, number: int, form: str) -> dict[str, float]:
    """Write made-up samples: a question about one picture, an answer of 40 to 120 words."""
    from dataprocess.output_forms import form_of

    drawn = random.Random(SEED)
    answers = [" ".join(drawn.choices(_WORDS, k=drawn.randint(20, 60))) for _ in range(1000)]
    start = time.process_time()
    with (folder / f"image_map.{form}").open("wb") as first, (folder / f"captions.{form}").open("wb") as second:
        image_map, captions = form_of(f".{form}")(first, "key"), form_of(f".{form}")(second, "ID")
        for index in range(number):
            name = f"{index:012d}.jpg"
            image_map.add(f"llava_1/{index:08d}/{name}", {"image_file": name, "ID": index, "path": "/pictures"})
            captions.add(index, {"q": "<|extra_0|>What is in this picture?", "a": answers[index % 1000]})
        image_map.finish()
        captions.finish()
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {"write_seconds": time.process_time() - start, "file_bytes": size}


class Watch(threading.Thread):
    """Notes the largest proportional memory of this process and its children together."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest = 0

    def run(self) -> None:
        """Look again and again."""
        while True:
            self.look()
            time.sleep(0.2)

    def look(self) -> int:
        """Look once; return what is in use now."""
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        now = sum(_proportional_bytes(pid) for pid in ["self", *children])
        self.largest = max(self.largest, now)
        return now


def _proportional_bytes(pid: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def read_samples(folder: Path, form: str) -> dict[str, float]:
    """Open the samples as training does, and read some of them through a loader."""
    import torch
    from torch.utils.data import DataLoader

    import train  # noqa: F401, what a training process has imported counts as the start
    from dataset import ImageCaptionDataset, VLMCollator
    from dataset.epoch_order import EpochOrder
    from model.runs.data_workers import with_calm_workers

    from .prepare_run import TextsOnly, new_tokenizer

    class Texts(TextsOnly):
        def set_epoch(self, epoch: int) -> None:
            self.dataset.set_epoch(epoch)

    tokenizer = new_tokenizer()
    tokenizer.encode_text("a")
    watch = Watch()
    before = watch.look()
    watch.start()
    start, processor = time.perf_counter(), time.process_time()
    files = folder / f"image_map.{form}", folder / f"captions.{form}"
    dataset = ImageCaptionDataset(*files, tokenizer, torch.zeros, 256, need_folders=False)
    opened = {"open_seconds": time.perf_counter() - start, "open_processor_seconds": time.process_time() - processor}
    opened["open_bytes"] = watch.largest
    places = random.Random(SEED).choices(range(len(dataset)), k=READS)
    processor = time.process_time()
    for place in places:
        _ = dataset.annotations[place]
    sample_seconds = (time.process_time() - processor) / READS
    collate = VLMCollator(tokenizer.pad_token_id)
    loader = with_calm_workers(DataLoader(EpochOrder(Texts(dataset), SEED), 4, num_workers=WORKERS, collate_fn=collate))
    seen = sum(len(batch["input_ids"]) for batch in islice(loader, READS // 4))
    watch.look()
    return {
        **opened,
        "samples": len(dataset),
        "seen": seen,
        "start_bytes": before,
        "processes_bytes": watch.largest,
        "sample_seconds": sample_seconds,
    }


# ---- All of them


def measure(number: int, form: str, place: Path | None) -> dict[str, float]:
    """Write and read so many samples in a form."""
    with tempfile.TemporaryDirectory(dir=place) as temporary:
        runs = itself(__file__)
        made = run_once([*runs, "--write", temporary, "--samples", str(number), "--forms", form])
        read = run_once([*runs, "--read", temporary, "--forms", form])
        return {**made.values, "write_peak_bytes": made.peak_bytes, **read.values}


def main() -> None:
    """Measure, print the table, and write it."""
    parse: argparse.ArgumentParser = parser(__doc__)
    parse.add_argument("--samples", type=int, nargs="+", default=[100_000, 1_000_000], help="how many (%(default)s)")
    parse.add_argument("--forms", nargs="+", default=["jsonl", "parquet"], choices=["json", "jsonl", "parquet"])
    parse.add_argument("--folder", type=Path, default=None, help="where the made-up files go; by default, /tmp")
    parse.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parse.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    given = parse.parse_args()
    if given.write or given.read:
        done = write_samples(given.write, given.samples[0], given.forms[0]) if given.write else None
        print(json.dumps(done or read_samples(given.read, given.forms[0])))
        return
    found = {}
    for form in given.forms:
        for number in given.samples:
            found[f"{form}, {number:,}"] = measure(number, form, given.folder)
    heads = ["", "files, GB", "start, MB", "opening, MB", "processes, MB", "B a sample", "opening, µs", "one, µs"]
    rows = []
    for name, one in found.items():
        more = (one["processes_bytes"] - one["start_bytes"]) / one["samples"]
        each = [one["file_bytes"] / 1e9, *(one[f"{what}_bytes"] / 1e6 for what in ("start", "open", "processes"))]
        each += [more, 1e6 * one["open_processor_seconds"] / one["samples"], 1e6 * one["sample_seconds"]]
        rows.append([name, *(f"{value:,.2f}" if value < 10 else f"{value:,.0f}" for value in each)])
    print(text_table(heads, rows))
    panels = {
        "MB": {
            name: {"start": one["start_bytes"] / 1e6, "all processes": one["processes_bytes"] / 1e6}
            for name, one in found.items()
        }
    }
    publish(given.output, "millions", {"workers": WORKERS, "figures": found}, "Image maps of up to 10 million", panels)


if __name__ == "__main__":
    main()
