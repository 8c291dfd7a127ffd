"""What it takes to train models of 7 to 72 billion parameters on 1, 8 and 64 GPUs with `--shard_model`, computed.

    python -m benchmarks.training.split_table

bf16, LoRA of rank 128, gradient checkpointing, CLIP-L, 4 samples a GPU with one image and 128 tokens of text each, 64
of them answers. `model/scaling/split_memory.py` says what is counted. Nothing of this ran on a GPU.
"""

from __future__ import annotations

import argparse

from transformers import Qwen2Config

from benchmarks.training.memory_table import ANSWER, LANGUAGE_MODELS, TEXT, TOWER_CONFIGS
from model import LoraSettings
from model.dry_run.memory_estimate import FP32, BatchShape, ModelShape, Setting, estimate_memory
from model.dry_run.planned_model import model_shape
from model.scaling.split_memory import estimate_split
from qwen import QWenConfig
from qwen.loss import CHUNK_LOGITS
from visual import TOWERS
from visual.shape import shape_of_tower

ROWS = 4
GPUS = (1, 8, 64)
QWEN2_72B = Qwen2Config(
    vocab_size=152064,
    hidden_size=8192,
    intermediate_size=29568,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)


def shapes() -> dict[str, ModelShape]:
    """Sizes of each model, by its name."""
    config = TOWER_CONFIGS["CLIP-L"]
    tower = shape_of_tower(TOWERS[config.model_type], config, config.image_size)
    configs = {name: QWenConfig(**LANGUAGE_MODELS[name]) for name in ("Qwen-7B", "Qwen-14B")}
    lora = LoraSettings(rank=128)
    found = {name: model_shape(one, tower, lora) for name, one in configs.items()}
    all_layers = LoraSettings(rank=128, target_modules=None)
    large = "72B, Qwen2's shape"
    found[large] = model_shape(QWEN2_72B, tower, all_layers)
    found[f"{large}, 4 bits"] = model_shape(QWEN2_72B, tower, all_layers, quantisation="4bit")
    return found


def markdown() -> str:
    """Return the table of `docs/scaling.md`."""
    heads = ["Language model", "Trained", "GPUs", "Memory, GB", "…without the flag, GB", "Kept from step to step, GB"]
    heads += ["Sent per step and GPU, GB", "Read by each while loading, GB", "A checkpoint, GB"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, shape in shapes().items():
        batch = BatchShape(ROWS, shape.image_tokens + TEXT, ROWS * ANSWER, ROWS)
        for gpus in GPUS:
            setting = Setting(checkpointing=True, chunk_logits=CHUNK_LOGITS, processes=gpus)
            split, whole = estimate_split(shape, setting, batch), estimate_memory(shape, setting, batch)
            numbers = [split.peak, whole.peak, split.kept, split.sent, split.read, 3 * FP32 * shape.trained]
            cells = [name, f"{shape.trained / 1e6:,.0f} M", str(gpus), *(f"{number / 1e9:.1f}" for number in numbers)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(markdown())


if __name__ == "__main__":
    main()
