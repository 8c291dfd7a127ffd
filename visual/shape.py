"""What a tower will be, told from its configuration: nothing is loaded, the model is made of shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from transformers import PreTrainedConfig

from visual.base import ImageTransform, VisionTower
from visual.loading import load_image_processor


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
    """Height and width of its input in pixels."""
    num_image_tokens: int
    """Features per image."""
    num_parameters: int
    """Parameters, all of them frozen."""


def shape_of_tower(
    tower_class: type[VisionTower], config: PreTrainedConfig, image_size: int, *, drop_first_patch: bool = False
) -> TowerShape:
    """Read the sizes off a configuration, and count the parameters of a model on the meta device.

    Args:
        tower_class: one of `visual.TOWERS`.
        config: the vision half's configuration, with the class's overrides.
        image_size: pixels.
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
    """Pixels of a tower's input: where the image processor rules (DINOv2), what it makes, if its file is there."""
    if tower_class.any_image_size:
        try:
            transform = ImageTransform(load_image_processor(name_or_path))
        except FileNotFoundError:
            pass
        else:
            return transform(Image.new("RGB", (40, 30))).shape[-1]
    return int(config.image_size)
