"""How the cost of a training step, and of a token of an answer, grows with each thing it depends on.

    python -m benchmarks.training.growth
    python -m benchmarks.training.growth --things batch width --dtype bfloat16 --steps 6

The step is that of `train_step.py` at the *vocabulary-true* size: batch 2, a picture of 224 × 224 (256 tokens), answers
of 64 tokens, LoRA of rank 128, no checkpointing. One thing at a time is made larger. Each setting is a process of its
own; seconds are the mean of its steps but the first, memory is the most that the process had resident, what it imports
included. *cache* is answering: seconds of the next token, one row, with so many in the cache. Ratios are over the first
row of each thing. Prints a table, writes `results/growth.json` and `.png`; 6 GB of random weights lie in the
temporary folder until it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..measure import RESULTS, draw_bars, itself, machine, medians, run_in_turn, run_once, text_table, write_results

ROOT = Path(__file__).resolve().parents[2]
BATCH, ANSWER, SAMPLES = 2, 64, 64


@dataclass(frozen=True)
class Change:
    """What a training step has other than the base."""

    times: dict[str, float] = field(default_factory=dict)
    """By how much fields of `peers.Size` are multiplied."""
    answer: int = ANSWER
    """Tokens of an answer, its end included."""
    flags: tuple[str, ...] = ()
    """What `train.py` is told besides."""

    @property
    def inputs(self) -> str:
        """Name of the folder of its models and samples."""
        return "-".join(["inputs", str(self.answer), *(f"{name}-{by:g}" for name, by in self.times.items())])


BASE = Change()
TRAINING = {
    "batch": {str(n): Change(flags=("--per_device_train_batch_size", str(n))) for n in (4, 8)},
    "answer": {f"{n} tokens": Change(answer=n) for n in (128, 256)},
    "picture": {"336 px, 576 tokens": Change({"image_size": 1.5})},
    "layers": {"16": Change({"layers": 2})},
    "width": {"1,024": Change({"width": 2, "inner": 2, "heads": 2})},
    "vocabulary": {"303,872": Change({"vocabulary": 2})},
    "lora_rank": {"8": Change(flags=("--lora_rank", "8"))},
    "checkpointing": {"on": Change(flags=("--gradient_checkpointing", "true"))},
}
"""Changes by the thing that is changed and what it then is."""
OF_BASE = {
    "batch": str(BATCH),
    "answer": f"{ANSWER} tokens",
    "picture": "224 px, 256 tokens",
    "layers": "8",
    "width": "512",
    "vocabulary": "151,936",
    "lora_rank": "128",
    "checkpointing": "off",
}
"""What each thing is in the base."""
DECODING = "cache"
CACHED = (128, 512, 1024, 2048)
"""Tokens that are in the cache when an answer's next one is decoded."""


# ---- In a process of its own


def size_of(times: dict[str, float], *, tiny: bool) -> Any:
    """The base size with some fields multiplied."""
    from dataclasses import replace

    from ..peers import TINY, Size

    base = TINY if tiny else Size()
    return replace(base, **{name: round(getattr(base, name) * by) for name, by in times.items()})


def write_inputs(folder: Path, times: dict[str, float], *, answer: int, tiny: bool) -> None:
    """Write pictures, texts and the models of one setting."""
    from .step_inputs import write_data, write_ours

    write_data(folder, SAMPLES, (answer, answer))
    write_ours(folder, size_of(times, tiny=tiny))


def decode(cached: int, given: argparse.Namespace) -> dict[str, float]:
    """Seconds of a token with so many tokens in the cache, the median over the tokens of an answer."""
    import statistics
    import time

    import torch

    from qwen.cache import GrowingCache

    from ..peers import build_ours

    size = size_of({}, tiny=given.tiny)
    torch.set_num_threads(given.threads)
    qwen = build_ours(size, getattr(torch, given.dtype)).qwen
    ids = torch.randint(0, 1000, (1, cached), generator=torch.Generator().manual_seed(0))
    cache, seconds = GrowingCache(qwen.config), []
    with torch.inference_mode():
        for _ in range(given.tokens + 1):
            start = time.perf_counter()
            out = qwen(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1].argmax(dim=-1, keepdim=True)
            seconds.append(time.perf_counter() - start)
    return {"step_seconds": statistics.median(seconds[1:]), "prompt_seconds": seconds[0]}


# ---- The table


def commands(root: Path, things: list[str], given: argparse.Namespace) -> dict[tuple[str, str], list[str]]:
    """What is measured, by thing and value; its inputs are written into folders of `root`."""
    script = [*itself(__file__), *(["--tiny"] if given.tiny else [])]
    common = ["--dtype", given.dtype, "--threads", str(given.threads)]
    changes = {(thing, value): change for thing in things for value, change in TRAINING.get(thing, {}).items()}
    found = {}
    for name, change in ({("base", ""): BASE} | changes if changes else {}).items():
        folder = root / change.inputs
        if not folder.exists():
            run_once([*script, "--write", str(folder), json.dumps(change.times), str(change.answer)])
        ours = [
            sys.executable,
            "-m",
            "benchmarks.training.step_runs",
            "ours",
            "--folder",
            str(folder),
            "--no_products",
            *common,
        ]
        steps = ["--steps", str(given.steps), "--skipped", "1", "--per_device_train_batch_size", str(BATCH)]
        found[name] = [*ours, *steps, *change.flags]
    for cached in CACHED if DECODING in things else ():
        found[DECODING, f"{cached:,} tokens"] = [
            *script,
            *common,
            "--tokens",
            str(given.tokens),
            "--decode",
            str(cached),
        ]
    return found


def measure(things: list[str], given: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Medians of each value of each thing, the base among them."""
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(given.threads), "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as root:
        todo = commands(Path(root), things, given)
        runs = run_in_turn({" ".join(name): command for name, command in todo.items()}, given.rounds, environment)
    figures = {name: medians(runs[" ".join(name)]) for name in todo}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for thing in things:
        found[thing] = {OF_BASE[thing]: figures["base", ""]} if thing in OF_BASE else {}
        found[thing] |= {value: one for (of, value), one in figures.items() if of == thing}
    return found


def show(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """The table; ratios are over the first row of each thing."""
    rows = []
    for thing, by_value in found.items():
        first = next(iter(by_value.values()))
        for value, one in by_value.items():
            row = [thing if one is first else "", value]
            for key, by in (("step_seconds", 1), ("peak_bytes", 1e9)):
                row += [f"{one[key] / by:.3f}", f"{one[key] / first[key]:.2f}"]
            rows.append(row)
    return text_table(("thing", "value", "s/step", "×", "peak GB", "×"), rows)


def main() -> None:
    """Measure, print, write; or be a process that writes or is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    every = [*TRAINING, DECODING]
    add("--things", nargs="+", choices=every, default=every, help="what is made larger (all)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of training and answering (%(default)s)")
    add("--steps", type=int, default=3, help="of each run; the first is left out (%(default)s)")
    add("--tokens", type=int, default=32, help="decoded with each length of the cache (%(default)s)")
    add("--rounds", type=int, default=1, help="runs of each (%(default)s)")
    add("--threads", type=int, default=os.cpu_count(), help="of a step (%(default)s)")
    add("--output", type=Path, default=RESULTS, help="folder for JSON and PNG (%(default)s)")
    add("--tiny", action="store_true", help="a model of no size, to try the script")
    add("--write", nargs=3, help=argparse.SUPPRESS)
    add("--decode", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write:
        folder, times, answer = given.write
        write_inputs(Path(folder), json.loads(times), answer=int(answer), tiny=given.tiny)
        return
    if given.decode:
        print(json.dumps(decode(given.decode, given)))
        return
    found = measure(given.things, given)
    print(show(found))
    settings = {"dtype": given.dtype, "steps": given.steps, "rounds": given.rounds, "threads": given.threads}
    write_results(given.output / "growth.json", {"machine": machine(), "settings": settings, "figures": found})
    groups = {}
    for thing, by_value in found.items():
        (least, first), *_, (most, last) = by_value.items()
        label = "\n".join([thing, *least.split(", "), "to", *most.split(", ")])
        kinds = {"seconds": "step_seconds", "peak memory": "peak_bytes"}
        groups[label] = {name: last[key] / first[key] for name, key in kinds.items()}
    panels = {"times those of the first value": groups}
    draw_bars(given.output / "growth.png", "What a step takes when one thing is changed", panels)


if __name__ == "__main__":
    main()
