"""What training over a language model in 8 or 4 bits takes on one GPU, computed from shapes; prints a table.

    python -m benchmarks.training.quantised_table

bf16, LoRA of rank 128 on `c_attn|w1|w2`, CLIP-L, one image in each sample and 128 tokens of text, 64 of them answers.
`model/dry_run/memory_estimate.py` says what is counted. Nothing of this ran on a GPU.
"""

from __future__ import annotations

import argparse

from benchmarks.training.memory_table import LANGUAGE_MODELS, TOWER_CONFIGS, peak
from model import LoraSettings
from model.dry_run.planned_model import model_shape
from qwen import QWenConfig
from visual import TOWERS
from visual.shape import shape_of_tower

BATCHES = (1, 4)
KINDS = {"bf16, as published": None, "8 bits": "8bit", "4 bits": "4bit"}


def markdown() -> str:
    """Return the table of `docs/scaling.md`."""
    heads = ["Language model", "Its weights", "They take, GB"]
    heads += [f"Batch {rows}{', checkpointing' if again else ''}, GB" for again in (True, False) for rows in BATCHES]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    config = TOWER_CONFIGS["CLIP-L"]
    tower = shape_of_tower(TOWERS[config.model_type], config, config.image_size)
    for language in ("Qwen-7B", "Qwen-14B"):
        for name, kind in KINDS.items():
            sizes = QWenConfig(**LANGUAGE_MODELS[language])
            shape = model_shape(sizes, tower, LoraSettings(rank=128), quantisation=kind)
            weights = 2 * (shape.language_parameters - shape.quantised_parameters) + shape.quantised_bytes
            cells = [f"{peak(shape, rows, checkpointing=again):.1f}" for again in (True, False) for rows in BATCHES]
            lines.append("| " + " | ".join([language, name, f"{weights / 1e9:.1f}", *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(markdown())


if __name__ == "__main__":
    main()
