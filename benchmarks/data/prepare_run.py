"""One measurement of `prepare.py`, in a process of its own: prints its figures as JSON.

    python -m benchmarks.data.prepare_run ready --folder FOLDER
    python -m benchmarks.data.prepare_run workers --folder FOLDER
    python -m benchmarks.data.prepare_run images --folder FOLDER

*ready*: from opening the two files to the first sample, and single samples after that, in any order. *workers*: what
two data workers have for themselves once each of them has read thousands of samples. *images*: pictures per second that
two workers open, decode and resize.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import CLIPImageProcessorPil

import train  # noqa: F401, what a training process has imported counts for none of the figures
from dataset import ImageCaptionDataset, VLMCollator
from model.runs.data_workers import with_calm_workers
from qwen import QWenTokenizer
from visual.base import ImageTransform

from ..inputs import SEED
from ..measure import resident
from ..vocabulary import vocabulary_file

IMAGE_TOKENS, WORKERS, READS = 256, 2, 4000


class TextsOnly(Dataset[dict[str, Any]]):
    """Samples without their pictures, of which the benchmark has few."""

    def __init__(self, dataset: ImageCaptionDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        encoded = self.dataset.encode(self.dataset.annotations[index])
        ids, labels = torch.tensor(encoded.input_ids), torch.tensor(encoded.labels)  # (T,) each
        return {"input_ids": ids, "labels": labels, "id": index}


def new_tokenizer() -> QWenTokenizer:
    """Return Qwen's tokenizer."""
    return QWenTokenizer(str(vocabulary_file()))


def open_dataset(folder: Path, tokenizer: QWenTokenizer, image_size: int = 224) -> ImageCaptionDataset:
    """Open the data set as training does, with CLIP's image processor."""
    edges = {"height": image_size, "width": image_size}
    transform = ImageTransform(CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=edges))
    files = folder / "image_map.json", folder / "captions.json"
    return ImageCaptionDataset(*files, tokenizer, transform, IMAGE_TOKENS)


def with_picture(folder: Path) -> list[int]:
    """Return the positions of the samples whose picture is there, as `prepare.py` wrote them."""
    return json.loads((folder / "with_picture.json").read_text())


def ready(folder: Path, tokenizer: QWenTokenizer) -> dict[str, float]:
    """Return seconds and memory until the first sample, and seconds of one sample anywhere."""
    before, start, processor = resident("VmRSS"), time.perf_counter(), time.process_time()
    dataset = open_dataset(folder, tokenizer)
    _ = dataset[with_picture(folder)[0]]
    figures = {
        "ready_seconds": time.perf_counter() - start,
        "ready_processor_seconds": time.process_time() - processor,
        "ready_bytes": resident("VmHWM") - before,
        "kept_bytes": resident("VmRSS") - before,
        "samples": len(dataset),
    }
    places = random.Random(SEED).choices(range(len(dataset)), k=READS)
    processor = time.process_time()
    for place in places:
        _ = dataset.annotations[place]
    return {**figures, "sample_seconds": (time.process_time() - processor) / READS}


def unique_bytes(pid: int) -> int:
    """Return the bytes that a process has for itself alone: of pages that no other process shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def workers(folder: Path, tokenizer: QWenTokenizer) -> dict[str, float]:
    """Return what each data worker has for itself, right after its start and after it has read its samples."""
    texts = TextsOnly(open_dataset(folder, tokenizer))
    places = random.Random(SEED).choices(range(len(texts)), k=WORKERS * READS)
    loader = with_calm_workers(
        DataLoader(
            Subset(texts, places), batch_size=4, num_workers=WORKERS, collate_fn=VLMCollator(tokenizer.pad_token_id)
        )
    )
    batches = iter(loader)
    pids = [process.pid for process in batches._workers]
    next(batches)
    first = max(map(unique_bytes, pids))
    last = first
    for number, _ in enumerate(batches):
        if number % 100 == 0 or number > len(loader) - 8:  # workers that have handed over their last batch end
            last = max(last, *_living(pids))
    return {"worker_bytes_at_start": first, "worker_bytes": last, "reads_per_worker": READS}


def _living(pids: list[int]) -> list[int]:
    found = [0]
    for pid in pids:
        try:
            found.append(unique_bytes(pid))
        except (OSError, ValueError):  # it has ended
            continue
    return found


def images(folder: Path, tokenizer: QWenTokenizer) -> dict[str, float]:
    """Return pictures per second of two workers, and processor time of one picture without any."""
    dataset = open_dataset(folder, tokenizer)
    places = with_picture(folder)
    processor = time.process_time()
    for place in places[:50]:
        _ = dataset[place]
    alone = (time.process_time() - processor) / len(places[:50])
    collate = VLMCollator(tokenizer.pad_token_id)
    loader = with_calm_workers(DataLoader(Subset(dataset, places), 4, num_workers=WORKERS, collate_fn=collate))
    batches = iter(loader)
    next(batches)  # the workers have started
    start = time.perf_counter()
    seen = sum(len(batch["input_ids"]) for batch in batches)
    return {"images_per_second": seen / (time.perf_counter() - start), "image_processor_seconds": alone}


MEASUREMENTS = {"ready": ready, "workers": workers, "images": images}


def main() -> None:
    """Take one measurement and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=MEASUREMENTS)
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args()
    print(json.dumps(MEASUREMENTS[given.what](given.folder, new_tokenizer())))


if __name__ == "__main__":
    main()
