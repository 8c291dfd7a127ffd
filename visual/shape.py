"""The sizes of a vision tower without its weights, for `--dry_run`: read from its configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from .base import ImageTransform, VisionTower
from .loading import load_image_processor


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


def shape_of_tower(
    tower_class: type[VisionTower], config: PreTrainedConfig, image_size: int, *, drop_first_patch: bool = False
) -> TowerShape:
    """Read the sizes from a configuration, and count the parameters of a model without storage.

    Args:
        tower_class: one of `visual.TOWERS`.
        config: the vision half's configuration, with the class's overrides.
        image_size: height and width of the input in pixels.
        drop_first_patch: as `build_vision_tower` takes it.
    """
    with torch.device("meta"):
        model = tower_class.model_class(config, **tower_class.model_kwargs)
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or int(width * getattr(config, "mlp_ratio", 4))
    return TowerShape(
        kind=tower_class.kind,
        hidden_size=width,
        intermediate_size=inner,
        image_size=image_size,
        num_image_tokens=(image_size // config.patch_size) ** 2 - int(drop_first_patch),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def input_size(tower_class: type[VisionTower], name_or_path: str, config: PreTrainedConfig) -> int:
    """Return the height and width of a tower's input in pixels, refusing an image processor as loading the tower does.

    Raises:
        FileNotFoundError: if its file is missing and only it tells the size (DINOv2).
        ValueError: if it cannot be used, or makes images that the tower does not take.
    """
    try:
        transform = ImageTransform(load_image_processor(name_or_path))
    except FileNotFoundError:
        if tower_class.any_image_size:
            raise
        return int(config.image_size)
    return tower_class.input_size(name_or_path, config, transform)
