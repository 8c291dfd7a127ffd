"""How the cost of a training step, and of a token of an answer, grows with each thing it depends on.

    python -m benchmarks.training.growth
    python -m benchmarks.training.growth --things batch width --dtype bfloat16 --steps 6

The step is that of `train_step.py` with the large vocabulary: batch 2, a picture of 224 × 224 (256 tokens), answers of
64 tokens, LoRA of rank 128, no checkpointing. One thing at a time is made larger. Each setting is a process of its own;
seconds are the mean of its steps but the first, memory is the most that the process had resident, imports included.
*cache* is answering: seconds of the next token, one row, with so many tokens in the cache. Ratios are over the first
row of each thing. Prints a table, writes `results/growth.json` and `.png`; 6 GB of random weights are in the temporary
folder until it ends.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..measure import DTYPES, itself, medians, parser, publish, run_in_turn, run_once, text_table

RUNS = itself(str(Path(__file__).with_name("step_runs.py")))
BATCH, ANSWER, SAMPLES = 2, 64, 64


@dataclass(frozen=True)
class Change:
    """What a training step has other than the base."""

    times: dict[str, float] = field(default_factory=dict)
    """By how much fields of `peers.Size` are multiplied."""
    answer: int = ANSWER
    """Tokens of an answer, its end included."""
    flags: tuple[str, ...] = ()
    """Further flags of `train.py`."""

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
CACHED = (128, 512, 1024, 2048)
"""Tokens that are in the cache when an answer's next one is decoded."""


# ---- In a process of its own


def size_of(times: dict[str, float], *, tiny: bool) -> Any:
    """Return the base size with some fields multiplied."""
    from ..peers import TINY, Size

    base = TINY if tiny else Size()
    return replace(base, **{name: round(getattr(base, name) * by) for name, by in times.items()})


def write_inputs(folder: Path, times: dict[str, float], *, answer: int, tiny: bool) -> None:
    """Write pictures, texts and the models of one setting."""
    from ..inputs import write_samples
    from ..peers import write_ours

    write_samples(folder, SAMPLES, (answer, answer))
    write_ours(folder, size_of(times, tiny=tiny))


def decode(cached: int, given: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of a token with so many in the cache, the median over the tokens of an answer."""
    import torch

    from ..peers import build_ours

    qwen = build_ours(size_of({}, tiny=given.tiny), getattr(torch, given.dtype)).qwen
    ids = torch.randint(0, 1000, (1, cached), generator=torch.Generator().manual_seed(0))
    cache, seconds = None, []
    with torch.inference_mode():
        for _ in range(given.tokens + 1):
            start = time.perf_counter()
            out = qwen(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = out.past_key_values, out.logits[:, -1].argmax(dim=-1, keepdim=True)  # ids (1, 1)
            seconds.append(time.perf_counter() - start)
    return {"step_seconds": statistics.median(seconds[1:]), "prompt_seconds": seconds[0]}


# ---- The table


def commands(root: Path, given: argparse.Namespace) -> dict[tuple[str, str], list[str]]:
    """Return what is measured, by thing and value; writes its inputs into folders of `root`."""
    script = [*itself(__file__), "--dtype", given.dtype, *(["--tiny"] if given.tiny else [])]
    changes = {(thing, value): change for thing in given.things for value, change in TRAINING.get(thing, {}).items()}
    found = {}
    for name, change in ({("base", ""): BASE} | changes if changes else {}).items():
        folder = root / change.inputs
        if not folder.exists():
            run_once([*script, "--write", str(folder), json.dumps(change.times), str(change.answer)])
        ours = [*RUNS, "ours", "--folder", str(folder), "--dtype", given.dtype]
        steps = ["--steps", str(given.steps), "--skipped", "1", "--per_device_train_batch_size", str(BATCH)]
        found[name] = [*ours, *steps, *change.flags]
    for cached in CACHED if "cache" in given.things else ():
        decoding = ["--tokens", str(given.tokens), "--decode", str(cached)]
        found["cache", f"{cached:,} tokens"] = [*script, *decoding]
    return found


def measure(given: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Return medians of each value of each thing, the base among them."""
    with tempfile.TemporaryDirectory() as root:
        todo = commands(Path(root), given)
        named = {" ".join(name): command for name, command in todo.items()}
        runs = run_in_turn(named, given.rounds, given.threads)
    figures = {name: medians(runs[" ".join(name)]) for name in todo}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for thing in given.things:
        found[thing] = {OF_BASE[thing]: figures["base", ""]} if thing in OF_BASE else {}
        found[thing] |= {value: one for (of, value), one in figures.items() if of == thing}
    return found


def show(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return the table; ratios are over the first row of each thing."""
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
    parse = parser(__doc__, rounds=1, can_be_tiny=True)
    add = parse.add_argument
    every = [*TRAINING, "cache"]
    add("--things", nargs="+", choices=every, default=every, help="what is made larger (all)")
    add("--dtype", choices=DTYPES, default="float32", help="of training and answering (%(default)s)")
    add("--steps", type=int, default=3, help="of each run; the first is left out (%(default)s)")
    add("--tokens", type=int, default=32, help="decoded with each length of the cache (%(default)s)")
    add("--write", nargs=3, help=argparse.SUPPRESS)
    add("--decode", type=int, help=argparse.SUPPRESS)
    given = parse.parse_args()
    if given.write:
        folder, times, answer = given.write
        write_inputs(Path(folder), json.loads(times), answer=int(answer), tiny=given.tiny)
        return
    if given.decode:
        print(json.dumps(decode(given.decode, given)))
        return
    found = measure(given)
    print(show(found))
    settings = {"dtype": given.dtype, "steps": given.steps, "rounds": given.rounds, "threads": given.threads}
    groups = {}
    for thing, by_value in found.items():
        (least, first), *_, (most, last) = by_value.items()
        label = "\n".join([thing, *least.split(", "), "to", *most.split(", ")])
        kinds = {"seconds": "step_seconds", "peak memory": "peak_bytes"}
        groups[label] = {name: last[key] / first[key] for name, key in kinds.items()}
    panels = {"times those of the first value": groups}
    results = {"settings": settings, "figures": found}
    publish(given.output, "growth", results, "What a step takes when one thing is changed", panels)


if __name__ == "__main__":
    main()
