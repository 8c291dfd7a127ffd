"""Image maps and captions of up to ten million samples: memory of the training processes together, and time a sample.

    python -m benchmarks.data.millions
    python -m benchmarks.data.millions --samples 100000 1000000 10000000 --forms jsonl parquet

Made-up samples are written by what `dataprocess/process_image.py` writes with. All of them show one picture in a tar
shard, under names of their own. Then train.py trains a model of no size for some steps, with two data workers.
*Processes* is the proportional memory (PSS) of the main process and its workers together, the largest that was seen
until the last step; *start* is that of the process before it opens the data, with everything that training imports.
*First step* is the time until that has ended, on the clock. *Pictures* are listed as for a feature cache, by the same
process afterwards, and *dry run* is a process of its own, with `--feature_cache`. Ten million samples take about 7 GB
of disk for both files as JSON lines. Prints a table, writes `results/millions.json` and `.png`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

from ..inputs import SEED, build_trainer, train_flags
from ..measure import itself, parser, publish, run_once, text_table

WORKERS = 2
STEPS = 5
BATCH = 4
READS = 4000
"""Samples whose texts are read in any order, to time one."""
SHARD = "shard-000000.tar"
_WORDS = ("a person", "image with", "of in", "street people", "standing near", "table while", "which might", "enjoying")


# ---- In a process of its own


def write_picture(folder: Path) -> bytes:
    """Write a shard of one picture; returns the picture's bytes."""
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(stream, "PNG")
    member = tarfile.TarInfo("000000000.png")
    member.size = len(stream.getvalue())
    with tarfile.open(folder / SHARD, "w", format=tarfile.USTAR_FORMAT) as shard:
        shard.addfile(member, io.BytesIO(stream.getvalue()))
    return stream.getvalue()


def write_samples(folder: Path, number: int, form: str) -> dict[str, float]:
    """Write base models and made-up samples: a question about one picture, an answer of 40 to 120 words."""
    from dataprocess.output_forms import form_of
    from dataprocess.shards import name_of_place

    from ..peers import TINY, write_ours

    drawn, picture = random.Random(SEED), write_picture(folder)
    answers = [" ".join(drawn.choices(_WORDS, k=drawn.randint(20, 60))) for _ in range(1000)]
    files = [folder / f"{name}.{form}" for name in ("image_map", "captions")]
    start = time.process_time()
    with files[0].open("wb") as first, files[1].open("wb") as second:
        image_map, captions = form_of(f".{form}")(first, "key"), form_of(f".{form}")(second, "ID")
        for index in range(number):
            name = name_of_place(SHARD, f"{index:09d}.png", 512, picture)
            key = f"llava_1/{index:08d}/{index:012d}.jpg"
            image_map.add(key, {"image_file": name, "ID": index, "path": str(folder)})
            captions.add(index, {"q": "<|extra_0|>What is in this picture?", "a": answers[index % 1000]})
        image_map.finish()
        captions.finish()
    done = {"write_seconds": time.process_time() - start, "file_bytes": sum(file.stat().st_size for file in files)}
    write_ours(folder, TINY)
    return done


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


def flags(folder: Path, form: str) -> list[str]:
    """Return the command line of train.py."""
    return train_flags(
        folder,
        folder / "run",
        image_map=folder / f"image_map.{form}",
        captions_file=folder / f"captions.{form}",
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        dataloader_num_workers=WORKERS,
        lora_rank=4,
    )


def train_on(folder: Path, form: str) -> dict[str, float]:
    """Train some steps, then read some samples and list all pictures."""
    from transformers import TrainerCallback

    import train  # noqa: F401, what a training process has imported counts as the start
    from model.feature_caching.image_list import images_of

    watch, stepped = Watch(), []
    before = watch.look()
    watch.start()
    start, processor = time.perf_counter(), time.process_time()
    trainer = build_trainer(flags(folder, form))
    figures: dict[str, float] = {
        "start_bytes": before,
        "open_seconds": time.perf_counter() - start,
        "open_processor_seconds": time.process_time() - processor,
        "open_bytes": watch.largest,
    }

    class NoteSteps(TrainerCallback):
        def on_step_end(self, *args: object, **kwargs: object) -> None:
            stepped.append(time.perf_counter() - start)
            watch.look()

    trainer.add_callback(NoteSteps())
    trainer.train()
    dataset = trainer.train_dataset.dataset
    figures |= {"samples": len(dataset), "seen": BATCH * len(stepped), "first_step_seconds": stepped[0]}
    figures["processes_bytes"] = watch.largest

    places = random.Random(SEED).choices(range(len(dataset)), k=READS)
    processor = time.process_time()
    for place in places:
        _ = dataset.annotations[place]
    figures["sample_seconds"] = (time.process_time() - processor) / READS

    watch.largest, processor = 0, time.process_time()
    figures["pictures"] = len(images_of([dataset]))
    figures |= {"pictures_seconds": time.process_time() - processor, "pictures_bytes": max(watch.largest, watch.look())}
    return figures


# ---- All of them


def measure(number: int, form: str, place: Path | None) -> dict[str, float]:
    """Write so many samples in a form, and train on them."""
    with tempfile.TemporaryDirectory(dir=place) as temporary:
        runs = itself(__file__)
        made = run_once([*runs, "--write", temporary, "--samples", str(number), "--forms", form])
        trained = run_once([*runs, "--train", temporary, "--forms", form], threads=1)
        asked = [*flags(Path(temporary), form), "--feature_cache", f"{temporary}/features", "--dry_run"]
        dry = run_once([sys.executable, "train.py", *asked], threads=1)
        dry_run = {"dry_run_seconds": dry.cpu_seconds, "dry_run_bytes": dry.peak_bytes}
        return {**made.values, **trained.values, **dry_run}


def main() -> None:
    """Measure, print the table, and write it."""
    parse: argparse.ArgumentParser = parser(__doc__)
    parse.add_argument("--samples", type=int, nargs="+", default=[100_000, 1_000_000], help="how many (%(default)s)")
    parse.add_argument("--forms", nargs="+", default=["jsonl", "parquet"], choices=["json", "jsonl", "parquet"])
    parse.add_argument("--folder", type=Path, default=None, help="where the made-up files go; by default, /tmp")
    parse.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parse.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    given = parse.parse_args()
    if given.write or given.train:
        done = write_samples(given.write, given.samples[0], given.forms[0]) if given.write else None
        print(json.dumps(done or train_on(given.train, given.forms[0])))
        return
    found = {}
    for form in given.forms:
        for number in given.samples:
            found[f"{form}, {number:,}"] = measure(number, form, given.folder)
    heads = ["", "files, GB", "start, MB", "opening, MB", "processes, MB", "pictures, MB", "dry run, MB"]
    heads += ["opening, µs", "one, µs", "a picture, µs", "first step, s", "dry run, s"]
    sizes = [f"{name}_bytes" for name in ("start", "open", "processes", "pictures", "dry_run")]
    rows = []
    for name, one in found.items():
        each = [one["file_bytes"] / 1e9, *(one[size] / 1e6 for size in sizes)]
        each += [1e6 * one["open_processor_seconds"] / one["samples"], 1e6 * one["sample_seconds"]]
        each += [1e6 * one["pictures_seconds"] / one["samples"], one["first_step_seconds"], one["dry_run_seconds"]]
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
