"""Build a language model hollow, as shapes without memory, for `--shard_model`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.utils import cached_file

from qwen import MultimodalQWenLMHeadModel, QWenConfig

from ..language_models.causal_lm import multimodal_class


def hollow_language_model(
    name_or_path: str, config: PreTrainedConfig, dtype: torch.dtype, quantisation: str | None = None
) -> Any:
    """Build a language model whose weights have shapes but no memory; what is computed (rotary frequencies) is real.

    Args:
        name_or_path: hub name or folder.
        config: its configuration.
        dtype: of the weights, or that quantised ones are computed in.
        quantisation: 4bit or None.

    Raises:
        ValueError: if its weights are stored in another form than that of its parameters.
        OSError: if they are neither here nor to be downloaded.
    """
    if get_checkpoint_conversion_mapping(config.model_type):
        raise ValueError(
            f"--shard_model: weights of model_type {config.model_type!r} are stored in another form than that of the "
            "model's parameters, and are not read in shares; leave --shard_model out, or give another language model"
        )
    _download_weights(name_or_path)
    config.name_or_path, config.dtype = name_or_path, dtype
    model_class: Any = MultimodalQWenLMHeadModel if isinstance(config, QWenConfig) else multimodal_class(config)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as transformers loads
    try:
        with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
            model = model_class(config)
    finally:
        torch.set_default_dtype(default)
    # One number that is seen as all numbers of a weight: unlike a meta tensor it has a device, so that whatever is
    # built next to it (LoRA) has real values.
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            hollow = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(hollow))
    if quantisation is not None:
        from .quantised import make_hollow_4bit

        make_hollow_4bit(model, dtype)
    model.tie_weights()
    return model.eval()


def _download_weights(name: str) -> None:
    """Have the hub's cache hold a language model's weights, unless it is a folder."""
    if Path(name).is_dir():
        return
    try:
        index = Path(str(cached_file(name, "model.safetensors.index.json")))
    except OSError:  # one file, or none at all, which the next line tells
        cached_file(name, "model.safetensors")
    else:
        for file in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
            cached_file(name, file)
