"""What `train.py --feature_cache` wins a training step, and what it costs on disk.

    python -m benchmarks.data.feature_cache
    python -m benchmarks.data.feature_cache --rounds 5 --dtype bfloat16

Tower and language model are of comparable cost: a CLIP of 12 layers × 512 at 224/14 (256 image tokens), and a QWen of
6 layers × 512 with the published vocabulary and short answers; LoRA of rank 128, batch 4, JPEG pictures of 640 × 480.
`train.py` runs in turn without a cache and with one that an earlier run has filled, each run a process of its own.
Medians are taken over the steps after the second, of seconds by the clock and of the processor's, which other programs
on the machine disturb less. Prints both tables; writes feature_cache.json and feature_cache.png into the output folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from ..measure import DTYPES, itself, medians, parser, publish, run_in_turn, run_once, text_table

BATCH, STEPS, WARM_UP = 4, 12, 2
PEERS = ("tower in each step", "features from the cache")
DATA_SETS = {"COCO 2017 train": 118_287, "AI Challenger train": 210_000}
PUBLISHED = {"CLIP-L/14, 224 px": (256, 1024), "SigLIP-so400m/14, 384 px": (729, 1152)}
"""Features of one image of the published towers."""
BLOCK = 4096
"""Bytes that file systems give out at once."""


def write_inputs(folder: Path, *, tiny: bool) -> None:
    """Write samples and base models."""
    from ..inputs import write_samples
    from ..peers import TINY, Size, write_ours

    write_samples(folder, BATCH * STEPS, (6, 6), detail=(60, 80))
    write_ours(folder, TINY if tiny else Size(layers=6, tower_layers=12, tower_width=512))


def train_once(folder: Path, peer: str, dtype: str) -> dict[str, float]:
    """Train for an epoch; returns the median seconds of a step, and the losses."""
    from ..inputs import build_trainer, train_flags
    from ..training.step_runs import Clock

    changes = {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "bf16": dtype == "bfloat16"}
    if peer == PEERS[1]:
        changes["feature_cache"] = folder / "cache"
    with tempfile.TemporaryDirectory() as output:
        trainer = build_trainer(train_flags(folder, output, dataloader_num_workers=0, **changes))
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds, cpu = (
        statistics.median(after - before for before, after in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False))
        for times in (clock.ends, clock.processor)
    )
    return {"step_seconds": seconds, "step_cpu_seconds": cpu, "first_loss": losses[0], "last_loss": losses[-1]}


def disk_rows() -> list[list[str]]:
    """Return what the features of both data sets take, for the published towers, in bf16."""
    import torch

    from visual.feature_cache import FeatureCache

    rows = []
    for tower, shape in PUBLISHED.items():
        size = FeatureCache(Path("none"), shape, torch.bfloat16).file_bytes
        on_disk = -(-size // BLOCK) * BLOCK
        images = sum(DATA_SETS.values())
        rows.append([tower, f"{images:,}", f"{size:,}", f"{on_disk:,}", f"{images * on_disk / 1e9:.1f} GB"])
    return rows


def show(figures: dict[str, dict[str, float]]) -> str:
    """Return the table of training."""
    without = figures[PEERS[0]]
    heads = ["", "s / step", "× as fast", "CPU s / step", "× as fast", "peak GB", "first loss", "last loss"]
    rows = []
    for peer, one in figures.items():
        row = [peer]
        for key in ("step_seconds", "step_cpu_seconds"):
            row += [f"{one[key]:.3f}", f"{without[key] / one[key]:.2f}"]
        rows.append([*row, f"{one['peak_bytes'] / 1e9:.2f}", f"{one['first_loss']:.5f}", f"{one['last_loss']:.5f}"])
    return text_table(heads, rows)


def main() -> None:
    """Measure, print and write; or be the process that is measured."""
    parse = parser(__doc__, rounds=3, can_be_tiny=True)
    parse.add_argument("--dtype", default="float32", choices=DTYPES, help="of training (%(default)s)")
    parse.add_argument("--one", choices=[*PEERS, "inputs"], help=argparse.SUPPRESS)
    parse.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parse.parse_args()
    if args.one == "inputs":
        write_inputs(args.folder, tiny=args.tiny)
        return
    if args.one:
        print(json.dumps(train_once(args.folder, args.one, args.dtype)))
        return
    script = [*itself(__file__), "--dtype", args.dtype, *(["--tiny"] if args.tiny else [])]
    with tempfile.TemporaryDirectory() as temporary:
        script += ["--folder", f"{temporary}/inputs", "--one"]
        run_once([*script, "inputs"])
        run_once([*script, PEERS[1]], args.threads)  # fills the cache
        runs = run_in_turn({peer: [*script, peer] for peer in PEERS}, args.rounds, args.threads)
    figures, disk = {peer: medians(done) for peer, done in runs.items()}, disk_rows()
    print(f"{args.dtype}, medians of {args.rounds} runs of {STEPS - WARM_UP} steps", show(figures), sep="\n")
    print(f"\n{' + '.join(DATA_SETS)}, in blocks of {BLOCK:,} bytes")
    print(text_table(["tower, bf16", "images", "bytes each", "on disk", "all"], disk))
    seconds = {args.dtype: {peer: found["step_seconds"] for peer, found in figures.items()}}
    results: dict[str, Any] = {"dtype": args.dtype, "figures": figures, "disk": disk}
    publish(args.output, "feature_cache", results, "A training step, frozen tower", {"seconds": seconds})


if __name__ == "__main__":
    main()
