"""Is the memory that `--dry_run --shard_model true` expects what processes take? Measured with 156 million parameters.

    python -m benchmarks.scaling.split_memory [--processes 2 4] [--dtypes float32 bfloat16] [--output OUTPUT]

The language model is a Qwen2 of 20 layers of width 768 with 9,496 tokens; LoRA of rank 128 with dropout, the same over
4 bits, or all of it is trained. Each run is torchrun on this CPU over gloo: three steps of batch 1 over samples of one
picture (64 tokens) and answers of 15 to 90 tokens. Measured is, of the process that took most, what was resident at
most (`VmHWM`) less what was once train.py had been imported.

Freed memory goes back to the system at once (`MALLOC_MMAP_THRESHOLD_`), so that tensors are measured. With
--keep_freed the C library keeps it, as it does by default, and processes take more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..inputs import build_trainer, draw_answers, train_flags, write_samples
from ..measure import DTYPES, ROOT, itself, parser, publish, resident, run_once, text_table

BATCH, STEPS = 1, 3
TRAINED: dict[str, dict[str, object]] = {
    "lora": {"lora_rank": 128},
    "lora, 4 bits": {"lora_rank": 128, "load_in_4bit": "true"},
    "all": {"train_only": "all"},
}


def write_inputs(folder: Path, most_processes: int) -> None:
    """Write base models and samples."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from ..peers import Size, small_tokenizer
    from ..random_weights import write_tower, write_weights

    samples = STEPS * BATCH * most_processes
    write_samples(folder, samples)
    config = Qwen2Config(
        vocab_size=9496,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=20,
        num_attention_heads=12,
        num_key_value_heads=12,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    write_weights(folder / "qwen", model, config, torch.float32, 100_000_000)
    small_tokenizer(draw_answers(samples)).save_pretrained(str(folder / "qwen"))
    write_tower(folder / "clip", Size(image_size=112).clip, torch.float32)


def flags(folder: Path, dtype: str, trained: str, *, checkpointing: bool) -> list[str]:
    """Return the command line of train.py."""
    return train_flags(
        folder,
        folder / "run",
        shard_model="true",
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        bf16=dtype == "bfloat16",
        gradient_checkpointing=checkpointing,
        overwrite_output_dir="true",
        **TRAINED[trained],
    )


def train_once(folder: Path, words: list[str]) -> None:
    """Train in this process, one of several, and note the bytes that it took."""
    import train  # noqa: F401

    before = resident("VmRSS")
    build_trainer(words).train()
    (folder / f"rank-{os.environ['RANK']}.json").write_text(str(resident("VmHWM") - before))


def expected(words: list[str], processes: int) -> float:
    """Return the bytes that the dry run expects of each process."""
    command = [sys.executable, "train.py", *words, "--dry_run"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found = re.search(rf"^{processes} process\w*((?: +[0-9.]+)+)$", printed[printed.index("split over") :], re.M)
    if found is None:
        raise ValueError(f"the dry run prints no row for {processes} processes:\n{printed}")
    return 1e9 * float(found[1].split()[0])  # the further columns are not this run's


def measure(given: Any, folder: Path) -> dict[str, dict[str, float]]:
    """Train with each number of processes, in each dtype, with and without checkpointing."""
    found: dict[str, dict[str, float]] = {}
    kinds = itertools.product(given.trained, given.dtypes, given.processes, (False, True))
    for trained, dtype, processes, checkpointing in kinds:
        words = flags(folder, dtype, trained, checkpointing=checkpointing)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        own = [*itself(__file__)[1:], "--folder", str(folder), "--train", json.dumps(words)]
        run_once([*torchrun, *own], threads=1)
        took = [int((folder / f"rank-{rank}.json").read_text()) for rank in range(processes)]
        name = f"{trained}, {dtype}, {processes} processes" + ", checkpointing" * checkpointing
        found[name] = {"measured": max(took), "estimated": expected(words, processes)}
    return found


def main() -> None:
    """Measure, print the table, and write it; or be a process that trains."""
    parse = parser(__doc__)
    parse.add_argument("--trained", nargs="+", choices=list(TRAINED), default=list(TRAINED))
    parse.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parse.add_argument("--processes", nargs="+", type=int, default=[2, 4], help="one of the dry run's (%(default)s)")
    for hidden in ("--folder", "--train"):
        parse.add_argument(hidden, help=argparse.SUPPRESS)
    parse.add_argument("--keep_freed", action="store_true", help="let the C library keep memory that was freed")
    given = parse.parse_args()
    if not given.keep_freed:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # bytes
    if given.train:
        train_once(Path(given.folder), json.loads(given.train))
        return
    with tempfile.TemporaryDirectory() as temporary:
        write_inputs(Path(temporary), max(given.processes))
        found = measure(given, Path(temporary))
    rows = []
    for name, one in found.items():
        difference = f"{100 * (one['estimated'] / one['measured'] - 1):+.0f}%"
        rows.append([name, f"{one['measured'] / 1e9:.2f}", f"{one['estimated'] / 1e9:.2f}", difference])
    print(text_table(["GB of a process", "measured", "estimated", "off by"], rows))
    bars = {name.replace(", ", "\n"): {what: each / 1e9 for what, each in one.items()} for name, one in found.items()}
    publish(given.output, "split_memory", {"figures": found}, "Memory of a process with --shard_model", {"GB": bars})


if __name__ == "__main__":
    main()
