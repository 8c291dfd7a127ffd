"""Is the memory that `--dry_run` expects the memory that training takes? Measured on two sizes that a CPU can train.

    python -m benchmarks.training.memory [--rounds 1] [--steps 3] [--output OUTPUT]

Each run is a process of its own: some steps of batch 4 over samples of one picture and answers of 15 to 90 tokens, LoRA
of rank 128 with dropout. Measured is the most that was ever resident (`VmHWM`) less what was resident once train.py had
been imported. The large vocabulary is Qwen's 151,936 tokens over 8 layers of width 512; *wide* is 8 layers of width
1024 with a language head that is as large a share of the model as in Qwen-7B.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..inputs import build_trainer, train_flags, write_samples
from ..measure import DTYPES, ROOT, itself, medians, parser, publish, resident, run_in_turn, run_once, text_table

SIZES = ("large-vocabulary", "wide")
BATCH = 4
PEAK = "most at one moment"
"""The dry run's last row of the memory that is needed."""


def write_inputs(folder: Path, size: str, samples: int) -> None:
    """Write base models and samples."""
    from ..peers import SIZES, write_ours

    write_samples(folder, samples)
    write_ours(folder, SIZES[size])


def flags(folder: Path, dtype: str, *, checkpointing: bool) -> list[str]:
    """Return the command line of train.py."""
    return train_flags(
        folder,
        folder / "run",
        lora_rank=128,
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        bf16=dtype == "bfloat16",
        gradient_checkpointing=checkpointing,
    )


def train_once(folder: Path, dtype: str, *, checkpointing: bool) -> dict[str, int]:
    """Train in this process, and return the bytes that it took."""
    from ..small_vocabulary import fold_token_ids

    before = resident("VmRSS")
    trainer = build_trainer(flags(folder, dtype, checkpointing=checkpointing))
    fold_token_ids(trainer, trainer.model.qwen)
    trainer.train()
    return {"measured": resident("VmHWM") - before}


def expected(folder: Path, dtype: str) -> list[dict[str, float]]:
    """Return the bytes that the dry run expects on this machine, by its rows: without checkpointing and with it."""
    command = [sys.executable, "train.py", *flags(folder, dtype, checkpointing=False), "--dry_run"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return parse_memory(printed)[:2]  # the further columns are a GPU's


def parse_memory(printed: str) -> list[dict[str, float]]:
    """Return the columns of the dry run's table of memory, in bytes."""
    lines = printed[printed.index("memory per process, GB") :].splitlines()
    columns: list[dict[str, float]] = [{} for _ in re.split(r" {2,}", lines[0].strip())[1:]]
    for line in lines[1:]:
        name, *cells = re.split(r" {2,}", line.strip())
        for column, cell in zip(columns, cells, strict=True):
            column[name] = 1e9 * float(cell)
        if name == PEAK:
            break
    return columns


def measure(given: Any) -> dict[str, dict[str, float]]:
    """Train each size in each dtype, with and without checkpointing; returns medians, and what was expected."""
    found: dict[str, dict[str, float]] = {}
    for size in given.sizes:
        for dtype in given.dtypes:
            with tempfile.TemporaryDirectory() as folder:
                inputs = [*itself(__file__), "--folder", folder]
                run_once([*inputs, "--write", size, "--steps", str(given.steps)])
                command = [*inputs, "--train", dtype]
                kinds = {f"{size}, {dtype}": command, f"{size}, {dtype}, checkpointing": [*command, "--checkpointing"]}
                runs = run_in_turn(kinds, given.rounds, given.threads)
                for (kind, done), estimate in zip(runs.items(), expected(Path(folder), dtype), strict=True):
                    found[kind] = {"measured": medians(done)["measured"], **estimate}
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """Return what was measured and estimated, in GB, and what the estimate consists of."""
    parts = [name for name in next(iter(found.values())) if name not in ("measured", PEAK)]
    rows = []
    for name, one in found.items():
        difference = f"{100 * (one[PEAK] / one['measured'] - 1):+.0f}%"
        row = [name, f"{one['measured'] / 1e9:.2f}", f"{one[PEAK] / 1e9:.2f}", difference]
        rows.append(row + [f"{one[part] / 1e9:.2f}" for part in parts])
    return text_table(["", "measured", "estimated", "off by", *parts], rows)


def main() -> None:
    """Measure, print the table, and write it; or be a process that writes or trains."""
    parse = parser(__doc__, rounds=1)
    parse.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parse.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parse.add_argument("--steps", type=int, default=3, help="optimizer steps of a run (%(default)s)")
    for hidden in ("--folder", "--write", "--train"):
        parse.add_argument(hidden, help=argparse.SUPPRESS)
    parse.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    given = parse.parse_args()
    if given.write:
        write_inputs(Path(given.folder), given.write, given.steps * BATCH)
        return
    if given.train:
        print(json.dumps(train_once(Path(given.folder), given.train, checkpointing=given.checkpointing)))
        return
    found = measure(given)
    print(table(found))
    bars = {
        name.replace(", ", "\n"): {"measured": one["measured"] / 1e9, "estimated": one[PEAK] / 1e9}
        for name, one in found.items()
    }
    publish(given.output, "memory", {"figures": found}, "Memory of training on a CPU, and its estimate", {"GB": bars})


if __name__ == "__main__":
    main()
