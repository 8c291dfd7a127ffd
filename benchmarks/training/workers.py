"""Does loading starve a training step? Seconds of a step, how long it waits for its batch, and pictures a second.

    python -m benchmarks.training.workers
    python -m benchmarks.training.workers --workers 0 2 --dtype bfloat16 --rounds 5

Our Trainer and its data loader read JPEG files of 640 × 480 pixels, with grain as large as photographs of that size, at
the *proportional* size of `train_step.py` in batches of 4. *Waits* is the part of a step in which the Trainer waits for
its batch: without workers, all of the loading. *Alone* is what the same loader delivers when nobody trains: a step that
takes more pictures a second than that would wait. Without an accelerator the workers and the step share the cores, so
a step is slower by what the workers take even if it never waits. Files come from the page cache.
Prints a table, writes `results/workers.json` and `.png`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from ..measure import DTYPES, itself, medians, parser, publish, run_in_turn, run_once, text_table

BATCH = 4
READ_AHEAD = 8
"""Batches that are read before the loader is timed alone."""


# ---- In a process of its own


def write_inputs(folder: Path, *, pictures: int, tiny: bool) -> None:
    """Write samples with pictures as large as photographs, and the model that is trained."""
    from ..inputs import write_samples
    from ..peers import SIZES, TINY, write_ours

    write_samples(folder, pictures, detail=(30, 40), grain=12)
    write_ours(folder, TINY if tiny else SIZES["proportional"])


class Waiting:
    """Notes the seconds of each call of a Trainer's `get_batch_samples`.

    Args:
        trainer: the Trainer, whose batches are taken through this object from now on.
    """

    def __init__(self, trainer: Any) -> None:
        self._get = trainer.get_batch_samples
        self.seconds: list[float] = []
        trainer.get_batch_samples = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take the batches of a step."""
        start = time.perf_counter()
        try:
            return self._get(*args, **kwargs)
        finally:
            self.seconds.append(time.perf_counter() - start)


def train_once(folder: Path, workers: int, given: argparse.Namespace) -> dict[str, float]:
    """Train with so many workers, then read all pictures through the same loader without training."""
    from .step_runs import Clock, build_ours

    with tempfile.TemporaryDirectory() as output:
        flags = ["--dataloader_num_workers", str(workers)]
        trainer = build_ours(folder, output, given.dtype, given.steps, flags)
        clock, waiting = Clock(), Waiting(trainer)
        trainer.add_callback(clock)
        trainer.train()
        steps = given.steps - given.skipped
        figures = {
            "step_seconds": (clock.ends[-1] - clock.ends[given.skipped]) / steps,
            "wait_seconds": sum(waiting.seconds[given.skipped : given.steps]) / steps,
        }
        batches = iter(trainer.get_train_dataloader())
        for _ in range(READ_AHEAD):  # workers prepare these before the clock starts
            next(batches)
        start = time.perf_counter()
        seen = sum(len(batch["pixel_values"]) for batch in batches)
        figures["pictures_per_second"] = seen / (time.perf_counter() - start)
    sizes = [file.stat().st_size for file in (folder / "pictures").iterdir()]
    return {**figures, "picture_bytes": sum(sizes) / len(sizes)}


# ---- The comparison


def measure(given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return medians by the number of workers."""
    script = [*itself(__file__), *(["--tiny"] if given.tiny else []), "--dtype", given.dtype]
    script += ["--steps", str(given.steps), "--skipped", str(given.skipped), "--pictures", str(given.pictures)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = f"{temporary}/inputs"
        run_once([*script, "--folder", folder, "--write"])
        commands = {str(number): [*script, "--folder", folder, "--one", str(number)] for number in given.workers}
        runs = run_in_turn(commands, given.rounds, given.threads)
    return {name: medians(measured) for name, measured in runs.items()}


def show(found: dict[str, dict[str, float]]) -> str:
    """Return the table."""
    rows = []
    for name, one in found.items():
        row = [name, f"{one['step_seconds']:.3f}", f"{one['wait_seconds']:.4f}"]
        row += [f"{100 * one['wait_seconds'] / one['step_seconds']:.2f}%", f"{BATCH / one['step_seconds']:.1f}"]
        rows.append([*row, f"{one['pictures_per_second']:.1f}"])
    heads = ("workers", "s/step", "of it waits, s", "waits", "pictures/s, training", "pictures/s, alone")
    size = next(iter(found.values()))["picture_bytes"]
    return f"{text_table(heads, rows)}\nmean size of a picture's file: {size / 1e3:.0f} kB"


def main() -> None:
    """Compare, print, write; or be a process that writes or is measured."""
    parse = parser(__doc__, rounds=3, can_be_tiny=True)
    add = parse.add_argument
    add("--workers", nargs="+", type=int, default=[0, 1, 2], help="numbers of data workers (%(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of training (%(default)s)")
    add("--steps", type=int, default=8, help="of each run (%(default)s)")
    add("--skipped", type=int, default=2, help="first steps that are left out (%(default)s)")
    add("--pictures", type=int, default=256, help="files, each read once (%(default)s)")
    add("--write", action="store_true", help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    add("--one", type=int, help=argparse.SUPPRESS)
    given = parse.parse_args()
    if given.write:
        write_inputs(given.folder, pictures=given.pictures, tiny=given.tiny)
        return
    if given.one is not None:
        print(json.dumps(train_once(given.folder, given.one, given)))
        return
    found = measure(given)
    print(show(found))
    settings = {name: getattr(given, name) for name in ("dtype", "steps", "skipped", "pictures", "rounds", "threads")}
    panels = {
        "seconds of a step": {
            f"{name} workers": {"step": one["step_seconds"], "of it waits": one["wait_seconds"]}
            for name, one in found.items()
        },
        "pictures per second": {
            f"{name} workers": {"training": BATCH / one["step_seconds"], "loader alone": one["pictures_per_second"]}
            for name, one in found.items()
        },
    }
    results = {"settings": settings, "figures": found}
    publish(given.output, "workers", results, "A training step and its data workers, batches of 4", panels)


if __name__ == "__main__":
    main()
