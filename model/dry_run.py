"""What `train.py --dry_run` says: parameters, tokens, steps and memory, before a weight is downloaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from qwen import QWenConfig, QWenLMHeadModel
from qwen.loss import CHUNK_LOGITS
from visual import TowerShape, read_tower_shape

from .arguments import ModelArguments
from .bases import drops_first_patch, num_projector_layers
from .checkpoint import read_checkpoint
from .language_model import read_language_config
from .lora import LoraSettings, check_targets
from .memory_estimate import BatchShape, MemoryEstimate, ModelShape, Setting, estimate_memory
from .projector import build_projector
from .training_arguments import VLMTrainingArguments

_MEMORY_ROWS = {
    "frozen_weights": "frozen weights",
    "trained_weights": "trained weights",
    "gradients": "gradients",
    "optimizer": "optimizer (AdamW)",
    "activations": "activations",
    "language_head": "language head and loss",
    "other": "the process beside its tensors",
    "peak": "most at one moment",
}


class SizeOfTokens(Protocol):
    """What is known of a sample or a batch, as `dataset` counts it."""

    @property
    def tokens(self) -> int:
        """Of the sample, or of a batch's longest one."""

    @property
    def supervised(self) -> int:
        """Tokens with a label."""

    @property
    def images(self) -> int:
        """Images."""


@dataclass(frozen=True)
class Plan:
    """A training run, as far as its length goes."""

    num_samples: int
    """Samples of the data set."""
    rows: int
    """Samples per process and batch."""
    accumulation: int
    """Batches per step."""
    processes: int
    """Processes."""
    epochs: float
    """Epochs."""
    max_steps: int
    """Steps that overrule the epochs, or -1."""
    max_length: int
    """The most tokens of a sample."""

    @classmethod
    def of(cls, args: VLMTrainingArguments, num_samples: int, max_length: int) -> Plan:
        """What the flags say."""
        return cls(
            num_samples=num_samples,
            rows=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            processes=args.world_size,
            epochs=args.num_train_epochs,
            max_steps=args.max_steps,
            max_length=max_length,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that go through the data once."""
        batches = math.ceil(self.num_samples / (self.rows * self.processes))
        return max(math.ceil(batches / self.accumulation), 1)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.epochs * self.steps_per_epoch)


def planned_model(asked: ModelArguments) -> tuple[ModelShape, LoraSettings]:
    """Sizes of the model that the flags ask for; base models are read as far as their config.json.

    Raises:
        ValueError: if a base model, a checkpoint or a target module is not there, or of an unknown type.
        OSError: likewise.
    """
    previous = read_checkpoint(asked.previous_lora_weights) if asked.previous_lora_weights is not None else None
    drop = drops_first_patch(previous, asked.base_value_model)
    tower = read_tower_shape(asked.base_value_model, drop_first_patch=drop)
    config = read_language_config(asked.base_language_model)
    default, layers = LoraSettings(), 2
    targets = default.target_modules if asked.target_modules is None else default.parse_targets(asked.target_modules)
    rank = asked.lora_rank or default.rank
    if previous is not None:
        rank, layers = previous.lora_config.r, num_projector_layers(previous)
        there = previous.lora_config.target_modules
        targets = (there,) if isinstance(there, str) else tuple(there or ())
    lora = LoraSettings(rank=rank, dropout=asked.lora_dropout, target_modules=targets)
    return model_shape(config, tower, lora, asked.projector_layers or layers), lora


def settings_to_show(lora: LoraSettings, args: VLMTrainingArguments, dtype: torch.dtype) -> dict[str, Setting]:
    """The machine at hand as the flags say, and where that has no GPU, one that has: bf16 on CUDA."""
    setting = Setting(
        dtype_bytes=dtype.itemsize,
        device="cpu" if args.device.type == "cpu" else "cuda",
        rank=lora.rank,
        dropout=lora.dropout,
        accumulates=args.gradient_accumulation_steps > 1,
        processes=args.world_size,
        chunk_logits=CHUNK_LOGITS,
    )
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    if setting.device == "cuda":
        return {f"GPU {short}": setting}
    return {f"CPU {short}": setting, "GPU bf16": replace(setting, dtype_bytes=2, device="cuda")}


def model_shape(config: QWenConfig, tower: TowerShape, lora: LoraSettings, projector_layers: int = 2) -> ModelShape:
    """Sizes of the model that a run would train; parameters are counted on the meta device.

    Raises:
        LoraTargetError: if a target module does not exist.
    """
    with torch.device("meta"):
        language = QWenLMHeadModel(config)
        projector = build_projector(tower.hidden_size, config.hidden_size, projector_layers)
    check_targets(language, lora.target_modules)
    targets = {
        name: module
        for name, module in language.named_modules()
        if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{t}") for t in lora.target_modules)
    }
    return ModelShape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        attention_width=config.num_attention_heads * config.kv_channels,
        inner=config.intermediate_size // 2,
        vocabulary=config.vocab_size,
        image_tokens=tower.num_image_tokens,
        tower_width=tower.hidden_size,
        tower_inner=tower.intermediate_size,
        lora_in_attention=tuple(linear.in_features for name, linear in targets.items() if ".h.0.attn." in f".{name}"),
        lora_in_mlp=tuple(linear.in_features for name, linear in targets.items() if ".h.0.mlp." in f".{name}"),
        tower_parameters=tower.num_parameters,
        language_parameters=_count(language),
        projector_parameters=_count(projector),
        lora_parameters=sum(lora.rank * (linear.in_features + linear.out_features) for linear in targets.values()),
    )


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def largest(shape: ModelShape, setting: Setting, batches: Sequence[BatchShape]) -> MemoryEstimate:
    """The estimate for the batch that takes most."""
    return max((estimate_memory(shape, setting, batch) for batch in set(batches)), key=lambda found: found.peak)


def parameter_table(shape: ModelShape) -> str:
    """Parameters of each part, all, trainable and frozen."""
    parts = {
        "vision tower": (shape.tower_parameters, 0),
        "projector": (shape.projector_parameters, shape.projector_parameters),
        "language model": (shape.language_parameters, 0),
        "LoRA": (shape.lora_parameters, shape.lora_parameters),
        "all": (shape.frozen + shape.trained, shape.trained),
    }
    rows = [[name, f"{total:,}", f"{trained:,}", f"{total - trained:,}"] for name, (total, trained) in parts.items()]
    return _table([["parameters", "all", "trainable", "frozen"], *rows])


def length_table(plan: Plan, samples: Sequence[SizeOfTokens], image_tokens: int) -> str:
    """Tokens per sample, least, mean and most; and the steps that the data make."""
    counted = {
        "all": [size.tokens for size in samples],
        "of images": [size.images * image_tokens for size in samples],
        "of answers, supervised": [size.supervised for size in samples],
    }
    rows = [
        [name, f"{min(counts):,}", f"{sum(counts) / len(counts):,.1f}", f"{max(counts):,}"]
        for name, counts in counted.items()
    ]
    looked = f"looked at: {len(samples):,} of {plan.num_samples:,} samples"
    per_step = f"{plan.rows} samples × {plan.accumulation} batches × {plan.processes} processes"
    steps = f"{plan.steps_per_epoch:,} steps per epoch, {plan.steps:,} in all; {per_step} a step"
    return "\n".join([_table([["tokens per sample", "least", "mean", "most"], *rows]), looked, steps])


def memory_table(shape: ModelShape, settings: Mapping[str, Setting], batches: Sequence[BatchShape], plan: Plan) -> str:
    """Memory of one process in GB, for each setting without and with gradient checkpointing.

    Args:
        shape: of the model.
        settings: by the name of their columns.
        batches: as an epoch would draw them; the one that takes most counts.
        plan: says the longest batch that could be.
    """
    columns = {
        f"{name}{', checkpointing' if again else ''}": replace(setting, checkpointing=again)
        for name, setting in settings.items()
        for again in (False, True)
    }
    found = [largest(shape, setting, batches) for setting in columns.values()]
    full = [estimate_memory(shape, setting, _longest(batches, plan)) for setting in columns.values()]
    rows = [["memory per process, GB", *columns]]
    rows += [[text, *(_gb(getattr(one, name)) for one in found)] for name, text in _MEMORY_ROWS.items()]
    rows.append([f"if every sample had {plan.max_length:,} tokens", *(_gb(one.peak) for one in full)])
    return _table(rows)


def report(
    shape: ModelShape,
    settings: Mapping[str, Setting],
    plan: Plan,
    samples: Sequence[SizeOfTokens],
    batches: Sequence[SizeOfTokens],
) -> str:
    """All that a dry run prints.

    Args:
        shape: of the model.
        settings: by the name of their columns.
        plan: of the run.
        samples: sizes of those that were looked at.
        batches: sizes of batches as an epoch draws them.
    """
    rows = min(plan.rows, len(samples))
    drawn = [BatchShape(rows, batch.tokens, batch.supervised, batch.images) for batch in batches]
    parts = (
        parameter_table(shape),
        length_table(plan, samples, shape.image_tokens),
        memory_table(shape, settings, drawn, plan),
        "Estimated from shapes (see model/memory_estimate.py) for the batch that takes most of those drawn. Gradients\n"
        "come as activations go, so that not all parts are there at one moment.",
    )
    return "\n\n".join(parts) + "\n"


def _longest(batches: Sequence[BatchShape], plan: Plan) -> BatchShape:
    images = max(batch.images for batch in batches)
    rows = max(batch.rows for batch in batches)
    share = max(batch.supervised / (batch.rows * batch.tokens) for batch in batches)
    return BatchShape(rows, plan.max_length, round(share * rows * plan.max_length), images)


def _gb(number: int) -> str:
    return f"{number / 1e9:.2f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
