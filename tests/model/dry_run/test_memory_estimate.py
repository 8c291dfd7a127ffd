"""The estimate of memory counts what autograd really keeps, and is near what a process really takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_families import make_family
from tiny_qwen import random_ids
from tiny_run import make_pictures, start, write_data
from tiny_towers import make_clip_checkpoint
from tiny_vlm import NUM_IMAGE_TOKENS

from benchmarks.training import memory_table
from benchmarks.training.memory import parse_memory
from dataset import ImageCaptionDataset
from model import LoraSettings, VisionLanguageModel
from model.checkpoints.base_models import read_language_config
from model.dry_run.data_sizes import data_sizes
from model.dry_run.memory_estimate import BatchShape, Setting, activations_of
from model.dry_run.planned_model import model_shape
from model.projector import build_projector
from model.runs.callbacks import parameter_counts
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


def random_batch(rows: int, image_token_id: int, padding: int = 0) -> dict[str, torch.Tensor]:
    """A batch in which each row has an image and ANSWER supervised tokens; the first has some padding at its end."""
    ids = random_ids(rows, TOKENS)
    ids[:, 3 : 3 + NUM_IMAGE_TOKENS] = image_token_id
    mask, labels = torch.ones_like(ids), torch.full_like(ids, IGNORE_INDEX)
    mask[0, TOKENS - padding :] = 0
    answers = slice(TOKENS - padding - ANSWER, TOKENS - padding)
    labels[:, answers] = ids[:, answers]
    pixels = torch.randn(rows, 3, 28, 28)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def kept_bytes(model: VisionLanguageModel, dtype: torch.dtype, padding: int = 0) -> tuple[int, int]:
    """Bytes of all storages that autograd keeps of a step, weights left out: the language head's, and the others'."""
    batch = random_batch(ROWS, model.qwen.image_token_id, padding)
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
    head = [t for t in kept.values() if t.shape[-1:] == (model.qwen.config.vocab_size,)]
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
        model.gradient_checkpointing_enable()  # by the name that all supported versions have
    head, others = kept_bytes(model, dtype)
    shape = model_shape(QWenConfig(**SIZES), read_tower_shape(clip), lora)
    setting = Setting(dtype.itemsize, "cpu", RANK, dropout, checkpointing)
    expected, _ = activations_of(shape, setting, BatchShape(ROWS, TOKENS, ROWS * ANSWER, ROWS))
    assert others == pytest.approx(expected, rel=0.05)
    assert head == 0  # the head's gradient is taken at once, chunk by chunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_activations_over_a_quantised_language_model(tmp_path, dtype, checkpointing, kind):
    pytest.importorskip("bitsandbytes")
    clip, lora = make_clip_checkpoint(tmp_path / "clip"), LoraSettings(RANK, target_modules=None)
    base = make_family(tmp_path / "qwen3", "qwen3", **MEDIUM)
    options = {"dtype": dtype, "device": "cpu", "trainable": True}
    model = VisionLanguageModel.from_pretrained(base, clip, quantisation=kind, **options)
    model.add_lora(lora)
    if checkpointing:
        model.gradient_checkpointing_enable()  # by the name that all supported versions have
    head, others = kept_bytes(model.train(), dtype, padding=3)
    shape = model_shape(read_language_config(base), read_tower_shape(clip), lora, quantisation=kind)
    setting = Setting(dtype.itemsize, "cpu", RANK, lora.dropout, checkpointing)
    expected, _ = activations_of(shape, setting, BatchShape(ROWS, TOKENS, ROWS * ANSWER, ROWS))
    assert others == pytest.approx(expected, rel=0.05)
    assert head == 0


MEDIUM = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "head_dim": 48,
}
"""A size at which no row of the estimate is hidden by others; heads are not the width's channels."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.1, 0.0])
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {}),
        ("qwen3", MEDIUM),
        *(pytest.param(family, {}, marks=pytest.mark.slow) for family in ("qwen2", "qwen3", "mistral")),
    ],
)
def test_activations_of_other_language_models(tmp_path, dtype, checkpointing, dropout, family, sizes):
    """In batches with padding, and with LoRA on all of attention and MLP."""
    clip, lora = make_clip_checkpoint(tmp_path / "clip"), LoraSettings(RANK, dropout=dropout, target_modules=None)
    base = make_family(tmp_path / family, family, **sizes)
    model = VisionLanguageModel.from_pretrained(base, clip, dtype=dtype, device="cpu", trainable=True)
    model.add_lora(lora)
    if checkpointing:
        model.gradient_checkpointing_enable()  # by the name that all supported versions have
    head, others = kept_bytes(model, dtype, padding=3)
    shape = model_shape(read_language_config(base), read_tower_shape(clip), lora)
    setting = Setting(dtype.itemsize, "cpu", RANK, dropout, checkpointing)
    expected, _ = activations_of(shape, setting, BatchShape(ROWS, TOKENS, ROWS * ANSWER, ROWS))
    assert others == pytest.approx(expected, rel=0.05)
    assert head == 0
    counts = parameter_counts(model)
    assert [shape.language_parameters, shape.lora_parameters] == [counts["language_model"][0], counts["lora"][0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen"])
def test_activations_of_a_language_model_that_is_trained(tmp_path, dtype, checkpointing, family):
    clip = make_clip_checkpoint(tmp_path / "clip")
    if family == "qwen":
        MultimodalQWenLMHeadModel(QWenConfig(**SIZES)).save_pretrained(tmp_path / family)
        base = str(tmp_path / family)
    else:
        base = make_family(tmp_path / family, family, **MEDIUM)
    options = {"dtype": dtype, "device": "cpu", "trainable": True, "train_only": "all"}
    model = VisionLanguageModel.from_pretrained(base, clip, **options)
    if checkpointing:
        model.gradient_checkpointing_enable()  # by the name that all supported versions have
    _, others = kept_bytes(model, dtype, padding=3)
    lora = LoraSettings(0, dropout=0.0)
    shape = model_shape(read_language_config(base), read_tower_shape(clip), lora, train_only="all")
    setting = Setting(dtype.itemsize, "cpu", 0, 0.0, checkpointing)
    expected, _ = activations_of(shape, setting, BatchShape(ROWS, TOKENS, ROWS * ANSWER, ROWS))
    assert others == pytest.approx(expected, rel=0.05)
    assert shape.trained == parameter_counts(model)["all"][1]


@pytest.mark.release
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


TRAIN = """
import sys
from benchmarks.measure import resident
import train
assert train.main(sys.argv[1:]) == 0
print("measured", resident("VmHWM"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "bf16", "checkpointing", "more"),
    [
        ("qwen3", False, True, []),
        ("llama", False, False, []),
        ("qwen3", True, False, ["--train_only", "all"]),
        ("qwen3", False, True, ["--load_in_4bit", "true"]),
        *(
            pytest.param(*case, marks=pytest.mark.release)
            for case in (
                *(
                    ("qwen3", bf16, checkpointing, [])
                    for bf16, checkpointing in ((False, False), (True, False), (True, True))
                ),
                *((family, False, False, []) for family in ("qwen2", "mistral")),
                ("qwen3", False, False, ["--train_only", "projector"]),
                ("qwen3", False, True, ["--train_only", "all"]),
                *(
                    ("qwen3", bf16, checkpointing, [f"--load_in_{kind}", "true"])
                    for bf16 in (False, True)
                    for checkpointing in (False, True)
                    for kind in ("4bit", "8bit")
                    if (bf16, checkpointing, kind) != (False, True, "4bit")
                ),
            )
        ),
    ],
)
def test_the_estimate_is_near_what_another_language_model_takes(tmp_path, family, bf16, checkpointing, more):
    """All that is resident of the process, its libraries too, of which the estimate has a row.

    Where weights are quantised, holes in the C library's heap, of which it has none, are a larger share of less: freed
    memory then goes back to the system at once, so that tensors are measured.
    """
    sizes = {"vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    base = make_family(tmp_path / family, family, **sizes, **heads)
    samples = [("red.png", ("<|extra_0|>What?", "word " * (30 + number))) for number in range(8)]
    make_pictures(tmp_path / "pictures")
    flags = [
        *("--base_language_model", base, "--base_value_model", make_clip_checkpoint(tmp_path / "clip")),
        *(*write_data(tmp_path, samples, tmp_path / "pictures"), "--output_dir", tmp_path / "run"),
        *("--bf16", bf16, "--gradient_checkpointing", checkpointing, "--use_cpu", "true", "--save_strategy", "no"),
        *("--per_device_train_batch_size", 4, "--num_train_epochs", 1, "--report_to", "none", *more),
    ]
    expected = parse_memory(start("python", "train.py", *flags, "--dry_run").stdout)[0]
    without_holes = {"MALLOC_MMAP_THRESHOLD_": "131072"} if "load_in" in str(more) else {}
    done = start("python", "-c", TRAIN, *flags, **without_holes)
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout.split("measured")[1])
    assert expected["most at one moment"] == pytest.approx(measured, rel=0.15)


def test_parameters_are_those_of_the_model(tmp_path):
    clip, lora = make_clip_checkpoint(tmp_path), LoraSettings(rank=RANK, target_modules=("c_attn", "c_proj"))
    shape = model_shape(QWenConfig(**SIZES), read_tower_shape(clip), lora)
    counts = parameter_counts(trainable(clip, torch.float32, lora))
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
