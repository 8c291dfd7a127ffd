"""The estimate of memory counts what autograd really keeps, and `--dry_run` says so without weights."""

from __future__ import annotations

import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_qwen import random_ids
from tiny_run import MIXED_CAPTIONS, make_language_model, one_line_error, start, write_data
from tiny_towers import make_clip_checkpoint, make_dinov2_checkpoint, make_siglip_checkpoint
from tiny_vlm import NUM_IMAGE_TOKENS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from benchmarks.training import memory_table
from model import LoraSettings, VisionLanguageModel
from model.dry_run.memory_estimate import (
    BatchShape,
    Setting,
    activations_of,
    estimate_evaluation,
    estimate_memory,
    evaluated_layer,
)
from model.dry_run.planned_model import model_shape
from model.dry_run.run_length import Plan
from model.projector import build_projector
from qwen import IGNORE_INDEX, IMAGE_TOKEN_ID, MultimodalQWenLMHeadModel, QWenConfig
from qwen.loss import CHUNK_LOGITS
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


def made_batch(rows: int) -> dict[str, torch.Tensor]:
    ids = random_ids(rows, TOKENS)
    ids[:, 3 : 3 + NUM_IMAGE_TOKENS] = IMAGE_TOKEN_ID
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -ANSWER:] = ids[:, -ANSWER:]
    pixels = torch.randn(rows, 3, 28, 28)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def kept_bytes(model: VisionLanguageModel, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of all storages that autograd keeps of a step, weights left out: the language head's, and the others'."""
    batch = made_batch(ROWS)
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
@pytest.mark.parametrize("targets", [LoraSettings.target_modules, ("c_attn", "c_proj", "w1", "w2")])
def test_activations_are_what_autograd_keeps(tmp_path, dtype, checkpointing, dropout, targets):
    clip, lora = make_clip_checkpoint(tmp_path), LoraSettings(rank=RANK, dropout=dropout, target_modules=targets)
    model = trainable(clip, dtype, lora)
    if checkpointing:
        model.activation_checkpointing_enable()
    head, others = kept_bytes(model, dtype)
    shape = model_shape(QWenConfig(**SIZES), read_tower_shape(clip), lora)
    setting = Setting(dtype.itemsize, "cpu", RANK, dropout, checkpointing)
    batch = BatchShape(ROWS, TOKENS, ROWS * ANSWER, ROWS)
    expected, _ = activations_of(shape, setting, batch)
    assert others == pytest.approx(expected, rel=0.05)
    assert head == 0  # the head's gradient is taken at once, chunk by chunk


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that were made since it was entered and are there still; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((args, kwargs))}
        made = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors_in(out)}
        for place, storage in made.items():
            if place not in given:
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return out

    def _add(self, number: int) -> None:
        self.now += number
        self.most = max(self.most, self.now)


def tensors_in(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_evaluation_has_one_block_at_a_time(tmp_path, dtype):
    rows, clip, lora = 8, make_clip_checkpoint(tmp_path), LoraSettings(rank=RANK, dropout=0.1)
    model, batch = trainable(clip, dtype, lora).eval(), made_batch(rows)
    live, peaks = LiveBytes(), []

    def begin(*_: object) -> None:
        live.most = live.now

    for block in model.qwen.transformer.h:
        block.register_forward_pre_hook(begin)
        block.register_forward_hook(lambda *_: peaks.append(live.most))
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32), live:
        model(**batch, return_logits=False)
    shape = model_shape(QWenConfig(**SIZES), read_tower_shape(clip), lora)
    setting = Setting(dtype.itemsize, "cpu", RANK)
    expected = evaluated_layer(shape, setting, BatchShape(rows, TOKENS, rows * ANSWER, rows))
    features = rows * NUM_IMAGE_TOKENS * SIZES["hidden_size"] * dtype.itemsize
    assert len(peaks) == SIZES["num_hidden_layers"]
    assert max(peaks) == pytest.approx(expected + features, rel=0.05)


@pytest.mark.parametrize("setting", [Setting(), Setting(dtype_bytes=4, device="cpu", chunk_logits=CHUNK_LOGITS)])
def test_an_evaluation_of_more_rows_takes_more(tmp_path, setting):
    shape = model_shape(QWenConfig(**SIZES), read_tower_shape(make_clip_checkpoint(tmp_path)), LoraSettings())
    one, five = (estimate_evaluation(shape, setting, BatchShape(n, TOKENS, n * ANSWER, n)) for n in (1, 5))
    assert one < five
    lasting = setting.dtype_bytes * shape.frozen + 3 * 4 * shape.trained
    assert one > lasting
    assert five < estimate_memory(shape, setting, BatchShape(5, TOKENS, 5 * ANSWER, 5)).peak


def test_parameters_are_those_of_the_model(tmp_path):
    clip, lora = make_clip_checkpoint(tmp_path), LoraSettings(rank=RANK, target_modules=("c_attn", "c_proj"))
    shape = model_shape(QWenConfig(**SIZES), read_tower_shape(clip), lora)
    counts = trainable(clip, torch.float32, lora).parameter_counts()
    assert shape.tower_parameters == counts["vision_tower"][0]
    assert shape.language_parameters == counts["language_model"][0]
    assert shape.projector_parameters == counts["projector"][0]
    assert shape.lora_parameters == counts["lora"][0]


@pytest.mark.parametrize("make", [make_clip_checkpoint, make_siglip_checkpoint, make_dinov2_checkpoint])
def test_the_shape_of_a_tower_needs_no_weights(tmp_path, make):
    tower = build_vision_tower(make(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    shape = read_tower_shape(tmp_path)
    assert (shape.kind, shape.hidden_size, shape.num_image_tokens, shape.image_size) == (
        tower.kind,
        tower.hidden_size,
        tower.num_image_tokens,
        tower.image_size,
    )
    assert shape.num_parameters == sum(parameter.numel() for parameter in tower.parameters())
    (tmp_path / "preprocessor_config.json").unlink()
    assert read_tower_shape(tmp_path).image_size == tower.config.image_size


def test_what_makes_the_estimate_larger(tmp_path):
    shape = model_shape(QWenConfig(**SIZES), read_tower_shape(make_clip_checkpoint(tmp_path)), LoraSettings())
    batch = BatchShape(4, 400, 200, 4)

    def peak(**changes) -> int:
        return estimate_memory(shape, replace(Setting(dtype_bytes=4, device="cpu"), **changes), batch).peak

    assert peak(checkpointing=True) < peak()
    assert peak(dtype_bytes=2) < peak()
    assert peak(dropout=0.0) < peak()
    assert peak(accumulates=True) > peak()
    assert peak(processes=2) > peak()
    assert peak(chunk_logits=1000) < peak()


def test_steps_of_a_plan():
    plan = Plan(num_samples=1001, rows=4, accumulation=2, processes=2, epochs=2, max_steps=-1, max_length=2048)
    assert (plan.steps_per_epoch, plan.steps) == (63, 126)
    assert replace(plan, max_steps=5).steps == 5


@pytest.fixture(scope="module")
def planned(tmp_path_factory, qwen_tiktoken) -> tuple[Path, list[str]]:
    """A folder without weights and without images, and the flags that name what is there."""
    folder = tmp_path_factory.mktemp("planned")
    language = make_language_model(folder / "qwen", qwen_tiktoken)
    clip = make_clip_checkpoint(folder / "clip")
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    data = write_data(folder / "data", MIXED_CAPTIONS, folder / "no_pictures")
    return folder, ["--base_language_model", language, "--base_value_model", clip, *data]


def test_dry_run_without_weights_or_images(planned, capsys):
    folder, flags = planned
    before = sorted(folder.rglob("*"))
    flags = [*flags, "--output_dir", str(folder / "out"), "--per_device_train_batch_size", "3", "--lora_rank", "4"]
    assert train.main([*flags, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "looked at: 12 of 12 samples" in printed
    assert "4 steps per epoch, 12 in all; 3 samples × 1 batch × 1 process a step" in printed
    assert "CPU fp32, checkpointing" in printed
    assert "GPU bf16, checkpointing" in printed
    assert sorted(folder.rglob("*")) == before
    assert train.main([*flags, "--dry_run", "--previous_lora_weights", str(folder)]) == 2


def test_dry_run_says_in_one_line_what_is_wrong(planned, tmp_path, capfd):
    folder, flags = planned
    flags = [*flags, "--dry_run", "true", "--output_dir", str(tmp_path / "out")]
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "llama"}')
    for flag, value, said in (
        ("--base_language_model", folder / "data", "config.json"),
        ("--base_language_model", unknown, "model_type 'llama'"),
        ("--base_value_model", folder / "data", "no config.json"),
        ("--base_value_model", unknown, "no known vision tower"),
        ("--target_modules", "nothing", "nothing"),
        ("--max_length", "3", "--max_length 3"),
    ):
        assert train.main([*flags, flag, str(value)]) == 2
        assert said in one_line_error(capfd.readouterr().err, "train.py")
    broken = tmp_path / "broken"
    shutil.copytree(folder / "qwen", broken)
    (broken / "config.json").write_text('{"model_type": "qwen", "intermediate_size": 7}')
    assert train.main([*flags, "--base_language_model", str(broken)]) == 2
    assert "must be even" in one_line_error(capfd.readouterr().err, "train.py")


def test_dry_run_from_the_command_line(planned):
    _, flags = planned
    done = start("python", "train.py", *flags, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("parameters ")
    assert not Path("trainer_output").exists()


def test_the_table_of_published_models():
    table = memory_table.markdown().splitlines()
    assert len(table) == 2 + len(memory_table.LANGUAGE_MODELS) * len(memory_table.TOWER_CONFIGS)
    readme = Path(__file__).parents[3].joinpath("README.md").read_text(encoding="utf-8")
    assert all(line in readme for line in table[2:])
