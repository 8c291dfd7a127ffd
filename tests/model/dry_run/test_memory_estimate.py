"""The estimate of memory counts what autograd really keeps, and is near what a process really takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_qwen import random_ids
from tiny_run import start, write_data
from tiny_towers import make_clip_checkpoint
from tiny_vlm import NUM_IMAGE_TOKENS

from benchmarks.training import memory_table
from dataset import ImageCaptionDataset
from model import LoraSettings, VisionLanguageModel
from model.dry_run.data_sizes import data_sizes
from model.dry_run.memory_estimate import BatchShape, Setting, activations_of
from model.dry_run.planned_model import model_shape
from model.projector import build_projector
from qwen import IGNORE_INDEX, IMAGE_TOKEN_ID, MultimodalQWenLMHeadModel, QWenConfig
from visual import build_vision_tower, read_tower_shape

RANK = 8
ROWS, TOKENS, ANSWER = 2, 40, 10
SIZES = {
    "vocab_size": IMAGE_TOKEN_ID + 2,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "intermediate_size": 352,
}


def trainable(clip: str, dtype: torch.dtype, lora: LoraSettings) -> VisionLanguageModel:
    qwen = MultimodalQWenLMHeadModel(QWenConfig(**SIZES)).to(dtype).requires_grad_(False)
    tower = build_vision_tower(clip, dtype)
    model = VisionLanguageModel(tower, build_projector(tower.hidden_size, 64), qwen, "", {})
    model.add_lora(lora)
    return model.train()


def random_batch(rows: int) -> dict[str, torch.Tensor]:
    ids = random_ids(rows, TOKENS)
    ids[:, 3 : 3 + NUM_IMAGE_TOKENS] = IMAGE_TOKEN_ID
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -ANSWER:] = ids[:, -ANSWER:]
    pixels = torch.randn(rows, 3, 28, 28)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def kept_bytes(model: VisionLanguageModel, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of all storages that autograd keeps of a step, weights left out: the language head's, and the others'."""
    batch = random_batch(ROWS)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        is_cast_weight = tensor.dim() == 2 and len(tensor) not in (ROWS * TOKENS, ROWS * ANSWER)
        if place not in weights and not is_cast_weight:
            kept[place] = tensor
        return tensor

    mixed = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), mixed:
        loss = model(**batch, return_logits=False).loss
    assert loss.isfinite()
    head = [t for t in kept.values() if t.shape[-1:] == (SIZES["vocab_size"],)]
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return sum(t.nbytes for t in head), total - sum(t.nbytes for t in head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_activations_are_what_autograd_keeps(tmp_path, dtype, checkpointing, dropout):
    targets = ("c_attn", "c_proj", "w1", "w2")
    clip, lora = make_clip_checkpoint(tmp_path), LoraSettings(rank=RANK, dropout=dropout, target_modules=targets)
    model = trainable(clip, dtype, lora)
    if checkpointing:
        model.activation_checkpointing_enable()
    head, others = kept_bytes(model, dtype)
    shape = model_shape(QWenConfig(**SIZES), read_tower_shape(clip), lora)
    setting = Setting(dtype.itemsize, "cpu", RANK, dropout, checkpointing)
    expected, _ = activations_of(shape, setting, BatchShape(ROWS, TOKENS, ROWS * ANSWER, ROWS))
    assert others == pytest.approx(expected, rel=0.05)
    assert head == 0  # the head's gradient is taken at once, chunk by chunk


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_is_near_what_a_process_takes(tmp_path, dtype):
    """Without gradient checkpointing and with it."""
    flags = ("--sizes", "wide", "--dtypes", dtype, "--steps", 2, "--output", tmp_path)
    done = start("python", "-m", "benchmarks.training.memory", *flags)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "memory.json").read_text())["figures"]
    assert len(figures) == 2
    for found in figures.values():
        assert found["most at one moment"] == pytest.approx(found["measured"], rel=0.15)


def test_parameters_are_those_of_the_model(tmp_path):
    clip, lora = make_clip_checkpoint(tmp_path), LoraSettings(rank=RANK, target_modules=("c_attn", "c_proj"))
    shape = model_shape(QWenConfig(**SIZES), read_tower_shape(clip), lora)
    counts = trainable(clip, torch.float32, lora).parameter_counts()
    for part in ("vision_tower", "language_model", "projector", "lora"):
        assert getattr(shape, f"{part.removeprefix('vision_').removesuffix('_model')}_parameters") == counts[part][0]


@pytest.fixture
def samples(tmp_path, tokenizer):
    """Open 200 samples of one more word each, with a seed."""
    data = write_data(tmp_path, [(None, ("Say.", "word " * number)) for number in range(1, 201)], tmp_path)
    return lambda seed=42: ImageCaptionDataset(data[1], data[3], tokenizer, torch.zeros, NUM_IMAGE_TOKENS, seed=seed)


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "sequential"])
def test_the_longest_batch_is_found_among_many(samples, strategy):
    found = data_sizes(samples(), rows=2, strategy=strategy, order_seed=42, most=5)
    assert len(found.batches) < 100
    assert max(batch.tokens for batch in found.batches) == max(len(sample["input_ids"]) for sample in samples())


def test_what_is_counted_is_drawn_from_all_samples(samples):
    every = [len(sample["input_ids"]) for sample in samples()]
    assert len(every) == 200
    how = {"rows": 2, "strategy": "sequential", "order_seed": 42, "most": 5}
    counted = [[sizes[0].tokens for sizes in data_sizes(samples(seed), **how).samples] for seed in (1, 2)]
    for tokens in counted:
        assert len(tokens) == 5
        assert set(tokens) <= set(every)
        assert tokens != every[:5]
    assert counted[0] != counted[1]


def test_the_table_of_published_models():
    table = memory_table.markdown().splitlines()
    assert len(table) == 2 + len(memory_table.LANGUAGE_MODELS) * len(memory_table.TOWER_CONFIGS)
    root = Path(__file__).parents[3]
    documents = [root / "README.md", *root.glob("docs/*.md")]
    text = "".join(file.read_text(encoding="utf-8") for file in documents)
    assert all(line in text for line in table[2:])
