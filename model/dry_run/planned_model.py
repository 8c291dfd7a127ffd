"""The model that a run would train, read from configurations and flags; no weight is downloaded."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from qwen import QWenConfig, QWenLMHeadModel
from qwen.loss import CHUNK_LOGITS
from visual import TowerShape, read_tower_shape

from ..arguments import ModelArguments, VLMTrainingArguments
from ..checkpoints.base_models import read_language_config
from ..checkpoints.checkpoint import drops_first_patch, read_checkpoint
from ..checkpoints.previous import check_previous
from ..lora import LoraSettings, check_targets, default_targets
from ..projector import build_projector, check_pixel_shuffle
from .memory_estimate import ModelShape, Setting


def planned_model(asked: ModelArguments) -> tuple[ModelShape, LoraSettings]:
    """Return the sizes of the model that the flags ask for, and its LoRA; no weights of the base models are read.

    Raises:
        ValueError: if a base model, a checkpoint or a target module is missing, unknown, or at odds with a flag.
        OSError: likewise.
    """
    lora, previous = asked.lora_settings, None
    layers, factor = asked.projector_layers or 2, asked.pixel_shuffle or 1
    if asked.previous_lora_weights is not None:
        previous = read_checkpoint(asked.previous_lora_weights)
        check_previous(asked, previous)
        there = previous.lora_config.target_modules
        targets = (there,) if isinstance(there, str) else tuple(there or ())
        lora = replace(lora, rank=previous.lora_config.r, target_modules=targets)
        layers, factor = previous.projector_layers, previous.pixel_shuffle
    drop = previous is not None and drops_first_patch(previous, asked.base_value_model)
    tower = read_tower_shape(asked.base_value_model, drop_first_patch=drop)
    check_pixel_shuffle(factor, tower.num_image_tokens)
    config = read_language_config(asked.base_language_model)
    if not isinstance(config, QWenConfig):
        raise ValueError(f"--dry_run: {asked.base_language_model} is no QWen; its memory can't be estimated yet")
    return model_shape(config, tower, lora, layers, factor), lora


def settings_to_show(lora: LoraSettings, args: VLMTrainingArguments) -> dict[str, Setting]:
    """Return the settings to show, by name: that of this machine, and if it has no GPU, bf16 on one too."""
    setting = Setting(
        dtype_bytes=args.frozen_dtype.itemsize,
        device="cpu" if args.device.type == "cpu" else "cuda",
        rank=lora.rank,
        dropout=lora.dropout,
        checkpointing=bool(args.gradient_checkpointing),
        accumulates=args.gradient_accumulation_steps > 1,
        processes=args.world_size,
        chunk_logits=CHUNK_LOGITS,
    )
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[args.frozen_dtype]
    if setting.device == "cuda":
        return {f"GPU {short}": setting}
    return {f"CPU {short}": setting, "GPU bf16": replace(setting, dtype_bytes=2, device="cuda")}


def model_shape(
    config: QWenConfig, tower: TowerShape, lora: LoraSettings, projector_layers: int = 2, pixel_shuffle: int = 1
) -> ModelShape:
    """Return the sizes of a model, its parameters counted without storage; refuse target modules that do not exist."""
    with torch.device("meta"):
        language = QWenLMHeadModel(config)
        projector = build_projector(tower.hidden_size * pixel_shuffle**2, config.hidden_size, projector_layers)
    wanted = default_targets(language) if lora.target_modules is None else lora.target_modules
    check_targets(language, wanted)
    targets = {
        name: module
        for name, module in language.named_modules()
        if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{t}") for t in wanted)
    }
    return ModelShape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        attention_width=config.num_attention_heads * config.kv_channels,
        inner=config.intermediate_size // 2,
        vocabulary=config.vocab_size,
        image_tokens=tower.num_image_tokens // pixel_shuffle**2,
        patches=tower.num_image_tokens,
        tower_width=tower.hidden_size,
        tower_inner=tower.intermediate_size,
        lora_layers=frozenset(name.split(".h.0.", 1)[1] for name in targets if ".h.0." in name),
        tower_parameters=tower.num_parameters,
        language_parameters=sum(parameter.numel() for parameter in language.parameters()),
        projector_parameters=sum(parameter.numel() for parameter in projector.parameters()),
        lora_parameters=sum(lora.rank * (linear.in_features + linear.out_features) for linear in targets.values()),
    )
