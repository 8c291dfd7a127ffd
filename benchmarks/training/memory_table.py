"""What training the published models takes on a GPU, estimated from their shapes; prints the table of the README.

    python -m benchmarks.training.memory_table

bf16 on CUDA, LoRA of rank 128 on `c_attn|w1|w2`, a projector of two layers, one image in each sample and 128 tokens of
text, 64 of them answers. `model/dry_run/memory_estimate.py` says what is counted. Nothing of this ran on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from transformers import CLIPVisionConfig, SiglipVisionConfig

from model import LoraSettings
from model.dry_run.memory_estimate import BatchShape, ModelShape, Setting, estimate_memory
from model.dry_run.planned_model import model_shape
from qwen import QWenConfig
from qwen.loss import CHUNK_LOGITS
from visual import TOWERS
from visual.shape import shape_of_tower

TEXT, ANSWER = 128, 64
"""Tokens of a sample beside its image, and those of them that have a label."""
BATCHES = (1, 4, 8)
LANGUAGE_MODELS = {
    "Qwen-1.8B": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 11008},
    "Qwen-7B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 22016},
    "Qwen-14B": {
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "intermediate_size": 27392,
        "vocab_size": 152064,
    },
}
TOWER_CONFIGS = {
    "CLIP-L": CLIPVisionConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        image_size=224,
        patch_size=14,
    ),
    "SigLIP-so400m": SiglipVisionConfig(
        hidden_size=1152,
        num_hidden_layers=27,
        num_attention_heads=16,
        intermediate_size=4304,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    ),
}


def shapes() -> Iterator[tuple[str, str, ModelShape]]:
    """Names and sizes of every language model with every tower."""
    for language, sizes in LANGUAGE_MODELS.items():
        for tower, config in TOWER_CONFIGS.items():
            tower_shape = shape_of_tower(TOWERS[config.model_type], config, config.image_size)
            yield language, tower, model_shape(QWenConfig(**sizes), tower_shape, LoraSettings(rank=128))


def peak(shape: ModelShape, rows: int, *, checkpointing: bool) -> float:
    """GB at most, for a batch of so many samples."""
    batch = BatchShape(rows, shape.image_tokens + TEXT, rows * ANSWER, rows)
    return estimate_memory(shape, Setting(checkpointing=checkpointing, chunk_logits=CHUNK_LOGITS), batch).peak / 1e9


def markdown() -> str:
    """The README's table."""
    heads = ["Language model", "Tower", "Trained", "Weights, optimizer"]
    heads += [f"Batch {rows}{', checkpointing' if again else ''}" for again in (False, True) for rows in BATCHES]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for language, tower, shape in shapes():
        found = estimate_memory(shape, Setting(), BatchShape(1, 1, 0, 0))
        lasting = (found.frozen_weights + found.trained_weights + found.optimizer) / 1e9
        cells = [f"{peak(shape, rows, checkpointing=again):.1f}" for again in (False, True) for rows in BATCHES]
        lines.append(
            "| " + " | ".join([language, tower, f"{shape.trained / 1e6:.0f} M", f"{lasting:.1f}", *cells]) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(markdown())


if __name__ == "__main__":
    main()
