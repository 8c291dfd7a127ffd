"""Tiny, seeded, randomly initialised vision checkpoints, written in the formats that are published.

Overrides of the vision half's configuration are keyword arguments, e.g. `make_clip_checkpoint(folder, image_size=42)`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def _build(model_class: Any, config: Any, seed: int) -> PreTrainedModel:
    """Initialise the model from a seed, leaving the global generator as it was, norms and biases random as well."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        with torch.no_grad():  # a norm that is an identity at the start would hide that it was not loaded
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _save(folder: str | Path, model: PreTrainedModel, processor: Any) -> str:
    model.save_pretrained(str(folder))
    processor.save_pretrained(str(folder))
    return str(folder)


def _clip_processor(size: int) -> CLIPImageProcessorPil:
    """The short edge is brought to a little more than the crop, so that resizing and cropping both do something."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": size + 4},
        crop_size={"height": size, "width": size},
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        resample=3,
    )


def make_clip_checkpoint(folder: str | Path, *, seed: int = 0, **vision: Any) -> str:
    """A full CLIPModel, text half included, and its image processor: by default 28 px, 4 patches, width 32."""
    config = CLIPConfig(text_config=dict(TEXT), vision_config=VISION | vision, projection_dim=16)
    model = _build(CLIPModel, config, seed)
    return _save(folder, model, _clip_processor(config.vision_config.image_size))


def make_siglip_checkpoint(folder: str | Path, *, seed: int = 0, **vision: Any) -> str:
    """A full SiglipModel, text half included, and its image processor: by default 28 px, 4 patches, width 32."""
    config = SiglipConfig(text_config=dict(TEXT), vision_config=VISION | vision)
    model = _build(SiglipModel, config, seed)
    size = config.vision_config.image_size
    processor = SiglipImageProcessorPil(
        size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3
    )
    return _save(folder, model, processor)


def make_dinov2_checkpoint(folder: str | Path, *, seed: int = 0, registers: int = 0, **vision: Any) -> str:
    """DINOv2, with register tokens if asked; as published, its positions belong to images larger than the crop."""
    settings = {k: v for k, v in VISION.items() if k != "intermediate_size"} | {"mlp_ratio": 2, "image_size": 56}
    settings |= vision
    model: PreTrainedModel
    if registers:
        with_registers = Dinov2WithRegistersConfig(num_register_tokens=registers, **settings)
        model = _build(Dinov2WithRegistersModel, with_registers, seed)
    else:
        model = _build(Dinov2Model, Dinov2Config(**settings), seed)
    processor = BitImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        resample=3,
    )
    return _save(folder, model, processor)


def make_dinov3_checkpoint(folder: str | Path, *, seed: int = 0, **vision: Any) -> str:
    """DINOv3 with four register tokens, and a preprocessor_config.json as published."""
    model = _build(DINOv3ViTModel, DINOv3ViTConfig(**(VISION | {"num_register_tokens": 4} | vision)), seed)
    model.save_pretrained(str(folder))
    size = model.config.image_size
    settings = {
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "data_format": "channels_first",
        "default_to_square": True,
    }
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


def make_vit_checkpoint(folder: str | Path, *, seed: int = 0, **vision: Any) -> str:
    """A plain ViTModel and its image processor."""
    config = ViTConfig(**(VISION | vision))
    model = _build(ViTModel, config, seed)
    processor = ViTImageProcessorPil(size={"height": config.image_size, "width": config.image_size})
    return _save(folder, model, processor)


def rename_weights(folder: str | Path, rename: Callable[[str], str | None]) -> None:
    """Write a checkpoint's weights again under other names; those renamed to None are left out."""
    file = Path(folder) / "model.safetensors"
    renamed = {rename(name): value for name, value in load_file(file).items()}
    save_file({name: value for name, value in renamed.items() if name is not None}, file, metadata={"format": "pt"})


def pixels(n: int = 2, size: int = 28, seed: int = 1) -> torch.Tensor:
    """Random pixel values, (n, 3, size, size)."""
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))
