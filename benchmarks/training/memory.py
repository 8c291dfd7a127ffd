"""Is the memory that `--dry_run` expects the memory that training takes? Measured on two sizes that a CPU can train.

    python -m benchmarks.training.memory [--rounds 1] [--steps 3] [--output OUTPUT]

Each run is a process of its own (`memory_run.py`): three steps of batch 4 over samples of one picture and answers of
15 to 90 tokens, LoRA of rank 128 with dropout. Measured is the most that was ever resident (`VmHWM`) less what was
resident once train.py had been imported. *Vocabulary-true* is 8 layers × 512 with Qwen's 151,936 rows; *wide*
is 8 × 1024 with so few rows (9,496, onto which token ids are folded) that the language head has the share that it has
in Qwen-7B.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from ..measure import RESULTS, draw_bars, machine, medians, run_in_turn, run_once, text_table, write_results

SIZES = ("vocabulary-true", "wide")
DTYPES = ("float32", "bfloat16")
_COLUMNS = ("frozen_weights", "trained_weights", "gradients", "optimizer", "activations", "language_head", "other")


def measure(rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """Train each size in each dtype, with and without checkpointing; medians over the rounds."""
    found: dict[str, dict[str, float]] = {}
    for size in SIZES:
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "benchmarks.training.memory_run", "--size", size, "--dtype", dtype]
                command += ["--steps", str(steps), "--folder", folder]
                run_once([*command, "--write"])
                name = f"{size}, {dtype}"
                kinds = {name: command, f"{name}, checkpointing": [*command, "--checkpointing"]}
                found |= {kind: medians(runs) for kind, runs in run_in_turn(kinds, rounds).items()}
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """Measured beside estimated, in GB, and what the estimate consists of."""
    heads = ["", "measured", "estimated", "off by", *(name.replace("_", " ") for name in _COLUMNS)]
    rows = [
        [
            name,
            f"{one['measured'] / 1e9:.2f}",
            f"{one['peak'] / 1e9:.2f}",
            f"{100 * (one['peak'] / one['measured'] - 1):+.0f}%",
            *(f"{one[column] / 1e9:.2f}" for column in _COLUMNS),
        ]
        for name, one in found.items()
    ]
    return text_table(heads, rows)


def main() -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="runs of each; the median counts")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of a run")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of JSON and PNG (%(default)s)")
    given = parser.parse_args()
    found = measure(given.rounds, given.steps)
    print(table(found))
    write_results(given.output / "memory.json", {"machine": machine(), "figures": found})
    bars = {
        name.replace(", ", "\n"): {"measured": one["measured"] / 1e9, "estimated": one["peak"] / 1e9}
        for name, one in found.items()
    }
    draw_bars(given.output / "memory.png", "Memory of training on a CPU beside the estimate", {"GB": bars})


if __name__ == "__main__":
    main()
