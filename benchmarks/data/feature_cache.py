"""What `train.py --feature_cache` wins a training step, and what it costs on disk.

    python -m benchmarks.data.feature_cache
    python -m benchmarks.data.feature_cache --rounds 5 --dtype bfloat16

Tower and language model are of comparable cost: a CLIP of 12 layers × 512 at 224/14 (256 image tokens), and a QWen of
6 layers × 512 with the published vocabulary and short answers; LoRA r = 128, batch 4, JPEG pictures of 640 × 480 px.
`train.py` runs in turn without a cache and with one, which it fills before its first step, each run a process of its
own. Medians are taken over the steps after the second, of seconds by the clock and of the processor's, which other
programs on the machine disturb less.
Prints a table of medians; writes feature_cache.json and feature_cache.png into the output folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .. import measure
from ..vocabulary import vocabulary_file

BATCH, STEPS, WARM_UP = 4, 12, 2
TOWER = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
LANGUAGE = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "kv_channels": 64}
PICTURE = (640, 480)
PEERS = ("tower in each step", "features read")
DATA_SETS = {"COCO 2017 train": 118_287, "AI Challenger train": 210_000}
PUBLISHED = {"CLIP-L/14, 224 px": (256, 1024), "SigLIP-so400m/14, 384 px": (729, 1152)}
BLOCK = 4096
"""Bytes that file systems give out at once."""


def write_inputs(folder: Path) -> None:
    """Write base models with random weights in the published formats, pictures, and both data files."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    from qwen import QWenConfig, QWenLMHeadModel

    from ..synthetic_data import QUESTION, write_files

    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**TOWER, image_size=224, patch_size=14)).save_pretrained(str(folder / "clip"))
    CLIPImageProcessorPil().save_pretrained(str(folder / "clip"))
    config = QWenConfig(vocab_size=151_936, intermediate_size=2 * 1376, **LANGUAGE)
    QWenLMHeadModel(config).save_pretrained(str(folder / "qwen"))
    shutil.copy(vocabulary_file(), folder / "qwen" / "qwen.tiktoken")

    random = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for number in range(BATCH * STEPS):
        small = random.integers(0, 256, (60, 80, 3), dtype=np.uint8)  # enlarged, as detailed as a photograph
        picture = Image.fromarray(small).resize(PICTURE, Image.Resampling.BICUBIC)
        picture.save(folder / "pictures" / f"{number}.jpg", quality=90)
    names = [f"{number}.jpg" for number in range(BATCH * STEPS)]
    answers = ["A field of many colours."] * len(names)
    write_files(folder, folder / "pictures", names, answers, QUESTION)


def train_once(folder: Path, peer: str, dtype: str) -> None:
    """Train for an epoch and print the median seconds of a step, and the losses."""
    import statistics
    import time

    from transformers import TrainerCallback

    import train

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[tuple[float, float]] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append((time.perf_counter(), time.process_time()))

    output, cache = folder / "run", folder / "cache"
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(cache, ignore_errors=True)
    flags = [
        *("--base_language_model", folder / "qwen", "--base_value_model", folder / "clip", "--output_dir", output),
        *("--image_map", folder / "image_map.json", "--captions_file", folder / "captions.json", "--max_steps", STEPS),
        *("--per_device_train_batch_size", BATCH, "--logging_steps", 1, "--save_strategy", "no", "--use_cpu", "true"),
        *(
            "--report_to",
            "none",
            "--disable_tqdm",
            "true",
            "--bf16",
            dtype == "bfloat16",
            "--dataloader_num_workers",
            0,
        ),
    ]
    if peer != PEERS[0]:
        flags += ["--feature_cache", cache]
    trainer = train.build_trainer([str(flag) for flag in flags])
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    pairs = list(zip(clock.times[WARM_UP - 1 :], clock.times[WARM_UP:], strict=False))
    wall, cpu = (statistics.median(after[i] - before[i] for before, after in pairs) for i in (0, 1))
    files = list(cache.glob("*/??/*.safetensors"))
    size = files[0].stat().st_size if files else 0
    figures = {"step_seconds": wall, "cpu_seconds": cpu, "first_loss": losses[0], "last_loss": losses[-1]}
    print("\n" + json.dumps({**figures, "files": len(files), "file_bytes": size}))


def disk_rows() -> list[list[str]]:
    """What the features of both data sets take, for the published towers, in bf16."""
    import torch

    from visual.feature_cache import FeatureCache

    rows = []
    for tower, shape in PUBLISHED.items():
        size = FeatureCache(Path("none"), shape, torch.bfloat16).file_bytes
        on_disk = -(-size // BLOCK) * BLOCK
        images = sum(DATA_SETS.values())
        rows.append([tower, f"{images:,}", f"{size:,}", f"{on_disk:,}", f"{images * on_disk / 1e9:.1f} GB"])
    return rows


def main() -> None:
    """Measure, print and write; or be the process that is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="training (%(default)s)")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="folder (%(default)s)")
    parser.add_argument("--one", choices=[*PEERS, "inputs"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one == "inputs":
        return write_inputs(args.folder)
    if args.one:
        return train_once(args.folder, args.one, args.dtype)
    script = [*measure.itself(__file__), "--dtype", args.dtype]
    with tempfile.TemporaryDirectory() as folder:
        measure.run_once([*script, "--folder", folder, "--one", "inputs"])
        kinds = {peer: [*script, "--folder", folder, "--one", peer] for peer in PEERS}
        runs = measure.run_in_turn(kinds, args.rounds)
    report({peer: measure.medians(measured) for peer, measured in runs.items()}, args)
    return None


def report(figures: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    """Print both tables and write the results."""
    without = figures[PEERS[0]]
    heads = ["", "s / step", "× as fast", "CPU s / step", "× as fast", "peak GB", "first loss", "last loss"]
    rows = [
        [
            peer,
            f"{found['step_seconds']:.3f}",
            f"{without['step_seconds'] / found['step_seconds']:.2f}",
            f"{found['cpu_seconds']:.3f}",
            f"{without['cpu_seconds'] / found['cpu_seconds']:.2f}",
            f"{found['peak_bytes'] / 1e9:.2f}",
            f"{found['first_loss']:.5f}",
            f"{found['last_loss']:.5f}",
        ]
        for peer, found in figures.items()
    ]
    disk_heads, disk = ["tower, bf16", "images", "bytes each", "on disk", "all"], disk_rows()
    print(f"{args.dtype}, medians of {args.rounds} runs of {STEPS - WARM_UP} steps")
    print(measure.text_table(heads, rows), end="\n\n")
    print(f"{' + '.join(DATA_SETS)}, in blocks of {BLOCK:,} bytes")
    print(measure.text_table(disk_heads, disk))
    results: dict[str, Any] = {"machine": measure.machine(), "dtype": args.dtype, "figures": figures, "disk": disk}
    measure.write_results(args.output / "feature_cache.json", results)
    seconds = {args.dtype: {peer: found["step_seconds"] for peer, found in figures.items()}}
    measure.draw_bars(args.output / "feature_cache.png", "A training step, frozen tower", {"seconds": seconds})


if __name__ == "__main__":
    main()
