"""The sizes of a vision tower without its weights, for `--dry_run`: read from its configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from .base import VisionTower
from .feature_layer import delete_later_blocks
from .loading import load_config, load_image_processor


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a vision tower."""

    kind: str
    """The family's `model_type`."""
    hidden_size: int
    """Channels of a feature."""
    intermediate_size: int
    """Channels inside the MLP of a block."""
    image_size: int
    """Height and width of the input in pixels."""
    num_image_tokens: int
    """Features per image."""
    num_parameters: int
    """Parameters, all of them frozen."""
    feature_layer: int = -1
    """The hidden state that features are, counted from the end."""


def read_shape(
    tower_class: type[VisionTower], name_or_path: str, *, drop_first_patch: bool, feature_layer: int
) -> TowerShape:
    """Read the sizes of a checkpoint's tower, refusing what loading the tower would refuse.

    Only for a tower that takes any size (DINOv2), preprocessor_config.json must be there: it alone tells the size.
    """
    config = load_config(tower_class.model_class, name_or_path, tower_class.config_overrides)
    size = None if tower_class.any_image_size else config.image_size
    try:
        size = load_image_processor(name_or_path, size, tower_class.processor_class)[1]
    except FileNotFoundError:
        if size is None:
            raise
    return shape_of_tower(tower_class, config, size, drop_first_patch=drop_first_patch, feature_layer=feature_layer)


def shape_of_tower(
    tower_class: type[VisionTower],
    config: PreTrainedConfig,
    image_size: int,
    *,
    drop_first_patch: bool = False,
    feature_layer: int = -1,
) -> TowerShape:
    """Take the sizes from the vision half's configuration, and count the parameters of a model without storage."""
    with torch.device("meta"):
        model = tower_class.model_class(config, **tower_class.model_kwargs)
    if feature_layer != -1:
        delete_later_blocks(model, tower_class.kind, feature_layer)
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or int(width * getattr(config, "mlp_ratio", 4))
    num_image_tokens = (image_size // config.patch_size) ** 2 - int(drop_first_patch)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return TowerShape(tower_class.kind, width, inner, image_size, num_image_tokens, num_parameters, feature_layer)
