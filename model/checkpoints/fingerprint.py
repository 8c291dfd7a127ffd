"""Fingerprints: whether two base models are the same, wherever they lie."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from qwen import QWenLMHeadModel
from visual.base import VisionTower

FP16 = "fp16-"
_VALUES_PER_TENSOR = 64


def model_fingerprint(model: nn.Module, *settings: dict[str, Any]) -> str:
    """Hash names, shapes and evenly spread values of all parameters, and what settings say.

    Values are taken as bfloat16, so that a model has one fingerprint whether it is loaded in fp32 or bf16. Those of a
    model in fp16, rounded twice, could differ from that; they are taken as they are.

    Args:
        model: the model, before LoRA layers are put in.
        settings: what else makes it what it is, such as how images are prepared for it.

    Returns:
        16 hexadecimal digits; of a model in fp16, which is comparable with others in fp16 only, behind "fp16-".
    """
    digest = hashlib.sha256()
    is_fp16 = next(model.parameters()).dtype == torch.float16
    dtype = torch.float16 if is_fp16 else torch.bfloat16
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()
        number = min(_VALUES_PER_TENSOR, values.numel())
        spread = torch.arange(number) * (values.numel() - 1) // max(number - 1, 1)  # whole numbers: exact
        sample = values[spread.to(values.device)].to(dtype).view(torch.int16).cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return (FP16 if is_fp16 else "") + digest.hexdigest()[:16]


def comparable(one: str, other: str) -> bool:
    """Whether two fingerprints can tell models apart: both known, and both of fp16 or neither."""
    return bool(one and other) and one.startswith(FP16) == other.startswith(FP16)


_LANGUAGE_SETTINGS = (
    *("num_attention_heads", "kv_channels", "layer_norm_epsilon", "rotary_pct", "rotary_emb_base"),
    *("seq_length", "use_dynamic_ntk", "use_logn_attn", "scale_attn_weights"),
)
_IMAGE_SETTINGS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std"),
)


def base_fingerprints(tower: VisionTower, language_model: QWenLMHeadModel) -> dict[str, str]:
    """Fingerprints of both base models, as `multimodal_config.json` keeps them.

    Args:
        tower: the vision tower; how it prepares images counts too.
        language_model: the language model, without LoRA layers.
    """
    names = ("vision_tower_fingerprint", "language_model_fingerprint")
    images = tower.image_transform.processor.to_dict()
    seen = {name: images.get(name) for name in _IMAGE_SETTINGS}
    config = {name: getattr(language_model.config, name) for name in _LANGUAGE_SETTINGS}
    prints = (model_fingerprint(tower, {"kind": tower.kind}, seen), model_fingerprint(language_model, config))
    return dict(zip(names, prints, strict=True))
