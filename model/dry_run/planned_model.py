"""The model that a run would train, read from configurations and flags; no weight is downloaded."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from qwen import QWenConfig, QWenLMHeadModel
from qwen.loss import CHUNK_LOGITS
from visual import TowerShape, read_tower_shape

from ..arguments import ModelArguments, VLMTrainingArguments
from ..checkpoints.base_models import read_language_config
from ..checkpoints.checkpoint import tower_settings
from ..checkpoints.previous import read_previous
from ..export.from_llava import llava_feature_layer
from ..language_models.causal_lm import check_image_length, multimodal_class
from ..lora import LoraSettings, check_targets, default_targets
from ..projector import build_projector
from .memory_estimate import ModelShape, Setting

_QWEN_INPUTS = {
    "attn.c_attn": "attention",
    "attn.c_proj": "attention output",
    "mlp.w1": "MLP",
    "mlp.w2": "MLP",
    "mlp.c_proj": "product",
}
_LLAMA_INPUTS = {
    "self_attn.q_proj": "attention",
    "self_attn.k_proj": "attention",
    "self_attn.v_proj": "attention",
    "self_attn.o_proj": "attention output",
    "mlp.gate_proj": "MLP",
    "mlp.up_proj": "MLP",
    "mlp.down_proj": "product",
}
"""What each linear layer of a block takes in."""
_LLAMA_BLOCK = {*_LLAMA_INPUTS, "input_layernorm", "post_attention_layernorm"}
_HEAD_NORMS = {"self_attn.q_norm", "self_attn.k_norm"}


def planned_model(asked: ModelArguments) -> tuple[ModelShape, LoraSettings]:
    """Return the sizes of the model that the flags ask for, and its LoRA; no weights of the base models are read.

    With `--train_only`, LoRA's rank is 0.

    Raises:
        ValueError: if a base model, a checkpoint or a target module is missing, unknown, or at odds with a flag.
        OSError: likewise.
    """
    lora, previous = asked.lora_settings, read_previous(asked)
    layers, factor = asked.projector_layers or 2, asked.pixel_shuffle or 1
    if previous is not None:
        layers, factor = previous.projector_layers, previous.pixel_shuffle
        if (trained := previous.lora_config) is not None:
            there = trained.target_modules
            targets = (there,) if isinstance(there, str) else tuple(there or ())
            lora = replace(lora, rank=trained.r, target_modules=targets)
    if asked.train_only is not None:
        lora = replace(lora, rank=0, dropout=0.0)
    config = read_language_config(asked.base_language_model)
    settings = {} if previous is None else tower_settings(previous, asked.base_value_model)
    if asked.from_llava is not None:
        settings = {"feature_layer": llava_feature_layer(asked.from_llava, asked.base_value_model, config.hidden_size)}
    tower = read_tower_shape(asked.base_value_model, **settings)
    check_image_length(asked.base_language_model, config, tower.num_image_tokens, factor)
    return model_shape(config, tower, lora, layers, factor, asked.train_only, asked.quantisation), lora


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
    config: PreTrainedConfig,
    tower: TowerShape,
    lora: LoraSettings,
    projector_layers: int = 2,
    pixel_shuffle: int = 1,
    train_only: str | None = None,
    quantisation: str | None = None,
) -> ModelShape:
    """Return the sizes of a model, its parameters counted without storage; refuse target modules that do not exist.

    Raises:
        ValueError: if target modules do not exist, or a block is built in a way that memory is not known for.
    """
    with torch.device("meta"):
        language = QWenLMHeadModel(config) if isinstance(config, QWenConfig) else multimodal_class(config)(config)
        projector = build_projector(tower.hidden_size * pixel_shuffle**2, config.hidden_size, projector_layers)
    block, inputs = _block_sizes(config, language), {**_QWEN_INPUTS, **_LLAMA_INPUTS}
    linears = {name: module for name, module in language.named_modules() if isinstance(module, nn.Linear)}
    wanted = default_targets(language) if lora.target_modules is None else lora.target_modules
    if train_only is not None:
        wanted = tuple(inputs) if train_only == "all" else ()
    else:
        check_targets(language, wanted)
    if quantisation is not None:
        from ..scaling.quantised import quantised_shape

        block |= quantised_shape(quantisation, language)
    targets = {name: module for name, module in linears.items() if any(f".{name}".endswith(f".{t}") for t in wanted)}
    if quantisation == "8bit":
        without = [name for name in linears if ".0." in name and name not in targets]
        block["kept_inputs"] = tuple(sorted({inputs[name.split(".0.", 1)[1]] for name in without}))
    return ModelShape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
        image_tokens=tower.num_image_tokens // pixel_shuffle**2,
        patches=tower.num_image_tokens,
        tower_width=tower.hidden_size,
        tower_inner=tower.intermediate_size,
        lora_inputs=tuple(inputs[name.split(".0.", 1)[1]] for name in targets if ".0." in name),
        tower_parameters=tower.num_parameters,
        language_parameters=sum(parameter.numel() for parameter in language.parameters()),
        outside_blocks=sum(p.numel() for name, p in language.named_parameters() if not re.search(r"\.\d+\.", name)),
        projector_parameters=sum(parameter.numel() for parameter in projector.parameters()),
        trains_language=train_only == "all",
        lora_parameters=sum(lora.rank * (linear.in_features + linear.out_features) for linear in targets.values()),
        **block,
    )


def _block_sizes(config: Any, language: nn.Module) -> dict[str, Any]:
    """Return what distinguishes the blocks of QWen and of models of Llama's build."""
    if isinstance(config, QWenConfig):
        width = config.num_attention_heads * config.kv_channels
        return {"attention_width": width, "key_width": width, "inner": config.intermediate_size // 2}
    weighted = {name.rsplit(".", 1)[0].split(".0.", 1)[1] for name, _ in language.named_parameters() if ".0." in name}
    if weighted - _HEAD_NORMS != _LLAMA_BLOCK or weighted & _HEAD_NORMS not in (set(), _HEAD_NORMS):
        raise ValueError(
            f"--dry_run: the memory of model_type {config.model_type!r} is not known: its blocks hold "
            f"{', '.join(sorted(weighted))} in place of Llama's layers; train some steps without --dry_run to see it"
        )
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width, keys = (head * heads for heads in (config.num_attention_heads, config.num_key_value_heads))
    return {
        "attention_width": width,
        "key_width": keys,
        "inner": config.intermediate_size,
        "mlp_kept": 3,
        "normed_width": width + keys if weighted & _HEAD_NORMS else 0,
        "last_layer_whole": True,
    }
