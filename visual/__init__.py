"""Frozen vision towers behind one interface.

    tower = build_vision_tower("openai/clip-vit-large-patch14", dtype=torch.bfloat16)
    features = tower(tower.image_transform(image)[None])      # (1, tower.num_image_tokens, tower.hidden_size)

A further backbone is one small file like `vit.py`, and a line in `TOWERS`.
"""

import os
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from .base import ImageTransform, VisionTower
from .clip_vit import CLIPTower
from .dinov2 import Dinov2Tower, Dinov2WithRegistersTower
from .dinov3 import Dinov3Tower
from .feature_layer import read_earlier
from .loading import one_error
from .shape import TowerShape, read_shape
from .siglip_vit import SiglipTower
from .vit import ViTTower

__all__ = ["TOWERS", "ImageTransform", "TowerShape", "VisionTower"]
__all__ += ["build_vision_tower", "read_tower_shape", "tower_class_of"]

TOWERS: dict[str, type[VisionTower]] = {
    "clip": CLIPTower,
    "clip_vision_model": CLIPTower,
    "siglip": SiglipTower,  # SigLIP 2 checkpoints of a fixed resolution are of this type too
    "siglip_vision_model": SiglipTower,
    "dinov2": Dinov2Tower,
    "dinov2_with_registers": Dinov2WithRegistersTower,
    "dinov3_vit": Dinov3Tower,
    "vit": ViTTower,
}
"""The class for each `model_type` that a checkpoint's config.json may name."""


def build_vision_tower(
    name_or_path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    drop_first_patch: bool = False,
    feature_layer: int = -1,
) -> VisionTower:
    """Load the vision tower that a checkpoint holds, chosen by the `model_type` in its config.json.

    Args:
        name_or_path: a local folder or a hub name, with config.json, weights and preprocessor_config.json. Of a
            CLIP-like checkpoint only the vision half is loaded.
        dtype: data type of the weights and the features; None is float32.
        drop_first_patch: leave SigLIP's first patch out, for models that the original project trained (728 tokens
            of 729).
        feature_layer: the hidden state that features are, counted from the end as LLaVA does: -1 is the last one.

    Raises:
        FileNotFoundError: if there is no such checkpoint, or one of its files is missing.
        ValueError: for a `model_type` that is not in `TOWERS`, or files that do not fit each other.
    """
    name = os.fspath(name_or_path)
    tower = tower_class_of(name)(name, dtype, drop_first_patch=drop_first_patch)
    if feature_layer != -1:
        read_earlier(tower, feature_layer)
    return tower


def read_tower_shape(
    name_or_path: str | os.PathLike[str], *, drop_first_patch: bool = False, feature_layer: int = -1
) -> TowerShape:
    """Read the sizes of the tower that a checkpoint holds, without its weights; raises as `build_vision_tower`."""
    name = os.fspath(name_or_path)
    return read_shape(tower_class_of(name), name, drop_first_patch=drop_first_patch, feature_layer=feature_layer)


def tower_class_of(name: str) -> type[VisionTower]:
    """Return the class for the `model_type` in a checkpoint's config.json; raises as `build_vision_tower`."""
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(f"vision tower {name!r} is no folder with a config.json: give one, or a hub name")
    problem = f"vision tower {name!r} cannot be read; give a folder with config.json and weights, or a hub name"
    with one_error(problem, FileNotFoundError):
        model_type = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    if isinstance(model_type, str) and model_type in TOWERS:
        return TOWERS[model_type]
    hint = "; of SigLIP 2, take a checkpoint of a fixed resolution" if str(model_type).startswith("siglip2") else ""
    raise ValueError(
        f"{name} has model_type {model_type!r}, which is no known vision tower; known are {', '.join(TOWERS)}{hint}"
    )
