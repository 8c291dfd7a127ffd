"""The true size, once: Qwen-7B-Chat's and CLIP-L's shapes through train.py for two steps and test.py for one answer.

    python -m benchmarks.training.full_size --folder FOLDER [--scale 1.0] [--output OUTPUT]

Random bf16 weights of the published shapes are written shard by shard, 16 GB in all; then `train.py` trains LoRA of
rank 128 on them on the CPU, in bf16, batch 1, with gradient checkpointing, and `test.py` answers from what it saved.
Each is a process of its own that is watched four times a second: resident memory, and of it what is anonymous. The
difference is pages of the weights' files, which the system may drop and read again. A process is ended if less than
`--least_free` GB are left on the machine. What was written is kept until the folder is deleted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..inputs import train_flags, write_samples
from ..measure import ROOT, itself, parser, publish, text_table

LAYERS, HEADS, HEAD_SIZE, INNER, VOCABULARY = 32, 32, 128, 11_008, 151_936
TOWER_LAYERS, TOWER_HEADS, TOWER_HEAD_SIZE = 24, 16, 64
STEPS, NEW_TOKENS = 2, 4
QUESTION = "这幅图像描述了什么？<|extra_0|>"
_INTERVAL = 0.25


@dataclass(frozen=True)
class Watched:
    """One process, from its start to its end."""

    seconds: float
    """Wall clock."""
    processor_seconds: float
    """Of all its threads."""
    peak_bytes: int
    """The most that was resident, mapped files included."""
    anonymous_bytes: int
    """The most that was resident and belongs to no file."""
    status: int
    """Its exit status; negative where a signal ended it."""
    output: str
    """What it wrote to stdout."""


def shapes(scale: float) -> dict[str, dict[str, int]]:
    """Return the sizes of both models for `random_weights`; below a scale of 1 narrower and of fewer layers."""
    heads, tower_heads = max(1, round(HEADS * scale)), max(1, round(TOWER_HEADS * scale))
    width, tower_width = heads * HEAD_SIZE, tower_heads * TOWER_HEAD_SIZE
    return {
        "qwen": {
            "layers": max(1, round(LAYERS * scale)),
            "width": width,
            "heads": heads,
            "inner": max(8, round(INNER * scale)),
            "vocabulary": VOCABULARY,
        },
        "clip": {"layers": max(1, round(TOWER_LAYERS * scale)), "width": tower_width, "inner": 4 * tower_width},
    }


def write_inputs(folder: Path, scale: float) -> None:
    """Write weights and samples."""
    from ..random_weights import clip_config, qwen_config, write_language_model, write_tower  # imports torch

    sizes = shapes(scale)
    write_language_model(folder / "qwen", qwen_config(**sizes["qwen"]))
    write_tower(folder / "clip", clip_config(**sizes["clip"]))
    write_samples(folder, STEPS)


def commands(folder: Path, rank: int) -> dict[str, list[str]]:
    """Return what is run, one after the other."""
    flags = train_flags(
        folder,
        folder / "run",
        lora_rank=rank,
        per_device_train_batch_size=1,
        max_steps=STEPS,
        bf16="true",
        gradient_checkpointing="true",
        overwrite_output_dir="true",
    )
    question = ["--image_path", str(folder / "pictures" / "0.jpg"), "--prompt", QUESTION]
    answer = ["--model_weights", str(folder / "run"), *question, "--greedy", "--max_new_tokens", str(NEW_TOKENS)]
    python, train, test = sys.executable, str(ROOT / "train.py"), str(ROOT / "test.py")
    return {
        "dry run": [python, train, *flags, "--dry_run"],
        "train.py, two steps": [python, train, *flags],
        "test.py, one answer": [python, test, *answer, "--device", "cpu", "--dtype", "bfloat16"],
    }


def watch(command: Sequence[str], log: Path, least_free: int) -> Watched:
    """Run a command to its end, looking at its memory; what it writes to stderr goes to a file.

    Args:
        command: program and arguments.
        log: the file.
        least_free: bytes that must stay available on the machine; with fewer the process is killed.
    """
    start = time.perf_counter()
    peak = anonymous = 0
    with log.open("wb") as errors, log.with_suffix(".out").open("wb") as out:
        process = subprocess.Popen(list(command), stdout=out, stderr=errors, cwd=ROOT)
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                peak = max(peak, _in_proc(f"/proc/{process.pid}/status", "VmHWM"))
                anonymous = max(anonymous, _in_proc(f"/proc/{process.pid}/status", "RssAnon"))
                if _in_proc("/proc/meminfo", "MemAvailable") < least_free:
                    process.kill()
                time.sleep(_INTERVAL)
        except BaseException:
            process.kill()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return Watched(
        seconds=time.perf_counter() - start,
        processor_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=max(peak, usage.ru_maxrss * 1024),
        anonymous_bytes=anonymous,
        status=process.returncode,
        output=log.with_suffix(".out").read_text(encoding="utf-8", errors="replace"),
    )


def _in_proc(file: str, name: str) -> int:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:  # the process has just ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def table(found: dict[str, Watched]) -> str:
    """Return time and memory of each process."""
    rows = [
        [
            name,
            f"{one.seconds:,.0f}",
            f"{one.processor_seconds:,.0f}",
            f"{one.peak_bytes / 1e9:.2f}",
            f"{one.anonymous_bytes / 1e9:.2f}",
            "as it should" if one.status == 0 else f"with status {one.status}",
        ]
        for name, one in found.items()
    ]
    return text_table(["", "s", "processor s", "GB at most", "anonymous", "ended"], rows)


def report(found: dict[str, Watched], given: argparse.Namespace, name: str, title: str) -> int:
    """Print and publish what was watched; return the worst exit status."""
    print(table(found))
    results = {"scale": given.scale, "processes": {step: asdict(one) for step, one in found.items()}}
    bars = {n: {"resident": w.peak_bytes / 1e9, "anonymous": w.anonymous_bytes / 1e9} for n, w in found.items()}
    publish(given.output, name, results, title, {"GB at most": bars})
    return max(abs(one.status) for one in found.values())


def main() -> int:
    """Write, train, ask, and print what it took; returns the exit status."""
    parse = parser(__doc__)
    parse.add_argument("--folder", type=Path, required=True, help="where everything is written; 17 GB at full size")
    parse.add_argument("--scale", type=float, default=1.0, help="share of width and layers; 1 is the true size")
    parse.add_argument("--lora_rank", type=int, default=128)
    parse.add_argument("--least_free", type=float, default=1.0, help="GB that must stay available on the machine")
    parse.add_argument("--write_only", action="store_true", help=argparse.SUPPRESS)
    given = parse.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if given.write_only:
        write_inputs(folder, given.scale)
        return 0
    writing = [*itself(__file__), "--write_only", "--folder", str(folder), "--scale", str(given.scale)]
    steps = {"writing the weights": writing, **commands(folder, given.lora_rank)}
    found: dict[str, Watched] = {}
    for name, command in steps.items():
        log = folder / f"{name.split(',')[0].replace(' ', '_')}.log"
        found[name] = watch(command, log, int(given.least_free * 1e9))
        print(found[name].output if name == "dry run" else table({name: found[name]}), flush=True)
        if found[name].status:
            print(log.read_text(encoding="utf-8", errors="replace")[-2000:], file=sys.stderr)
            break
    return report(found, given, "full_size", "The true size on a CPU")


if __name__ == "__main__":
    sys.exit(main())
