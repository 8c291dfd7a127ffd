"""One training run of `memory.py`, in a process of its own: prints what it took, and what was estimated, as JSON.

    python -m benchmarks.training.memory_run --size vocabulary-true --dtype float32 --steps 3 --folder FOLDER

The peak is `VmHWM`, the most memory that was ever resident, less what was resident once train.py had been imported.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import train
from model.command_line import parse_arguments
from model.dry_run.data_sizes import data_sizes
from model.dry_run.memory_estimate import BatchShape
from model.dry_run.planned_model import largest, planned_model, settings_to_show

from ..peers import Size
from ..random_weights import SEED, write_language_model, write_tower
from ..small_vocabulary import FoldedLabels, fold
from ..synthetic_data import QUESTION, Answers, write_files

RANK, BATCH = 128, 4
SIZES = {
    # Of all that multiplies in the language model, the head is three quarters.
    "vocabulary-true": Size(),
    # The head has 8.8% of it, as in Qwen-7B: rows = 151,936 · (8 · 1024) / (32 · 4096).
    "wide": Size(width=1024, inner=2752, vocabulary=9_496),
}


def resident(name: str) -> int:
    """`VmRSS` (now), `VmHWM` (at most) or `RssAnon` (now, without mapped files) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def write_inputs(folder: Path, size: Size, dtype: torch.dtype, samples: int) -> None:
    """Write both base models, pictures, image map and captions."""
    write_language_model(folder / "qwen", size.qwen, dtype)
    write_tower(folder / "clip", size.clip, dtype)
    drawn, answers = Answers(np.random.default_rng(SEED)), []
    for index in range(samples):
        Image.new("RGB", (64, 48), (index % 256, 80, 40)).save(folder / f"{index}.png")
        answers.append(drawn.draw())
    write_files(folder, folder, [f"{index}.png" for index in range(samples)], answers, QUESTION)


def flags(folder: Path, dtype: torch.dtype, checkpointing: bool) -> list[str]:
    """The command line of train.py."""
    values = {
        "base_language_model": folder / "qwen",
        "base_value_model": folder / "clip",
        "image_map": folder / "image_map.json",
        "captions_file": folder / "captions.json",
        "output_dir": folder / "run",
        "lora_rank": RANK,
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "use_cpu": "true",
        "bf16": str(dtype == torch.bfloat16).lower(),
        "gradient_checkpointing": str(checkpointing).lower(),
        "disable_tqdm": "true",
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def run(folder: Path, size: Size, dtype: torch.dtype, checkpointing: bool) -> dict[str, Any]:
    """Train on what the folder holds, and measure."""
    argv = flags(folder, dtype, checkpointing)
    before, start = resident("VmRSS"), time.process_time()
    trainer = train.build_trainer(argv)
    qwen = trainer.model.qwen
    if size.vocabulary < 151_000:
        qwen.transformer.wte = fold(qwen.transformer.wte)
        trainer.data_collator = FoldedLabels(trainer.data_collator, size.vocabulary)
    loaded = resident("VmHWM")
    trainer.train()
    measured = resident("VmHWM") - before
    model_args, _, args = parse_arguments(argv)
    shape, lora = planned_model(model_args)
    samples = trainer.train_dataset.dataset
    sizes = data_sizes(samples, rows=BATCH, strategy="random", order_seed=args.seed)
    batches = [BatchShape(sizes.rows, b.tokens, b.supervised, b.images) for b in sizes.batches]
    setting = next(iter(settings_to_show(lora, args, dtype).values()))
    found = largest(shape, replace(setting, checkpointing=checkpointing), batches)
    return {
        "measured": measured,
        "loaded": loaded - before,
        "before": before,
        "processor_seconds": time.process_time() - start,
        **asdict(found),
    }


def main() -> None:
    """Write the inputs if they are not there, train, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--write", action="store_true", help="only write the inputs into the folder")
    parser.add_argument("--folder", type=Path, help="where inputs are; by default they are written and deleted")
    given = parser.parse_args()
    size, dtype = SIZES[given.size], getattr(torch, given.dtype)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        if given.write or given.folder is None:
            write_inputs(folder, size, dtype, given.steps * BATCH)
        print(json.dumps({} if given.write else run(folder, size, dtype, given.checkpointing)))


if __name__ == "__main__":
    main()
