"""DINOv2 (Oquab et al. 2023, https://arxiv.org/abs/2304.07193), with and without register tokens."""

from typing import ClassVar

from transformers import Dinov2Model, Dinov2WithRegistersModel, PreTrainedModel

from .base import VisionTower


class Dinov2Tower(VisionTower):
    """E.g. facebook/dinov2-large: 224 px, 256 tokens of 1024.

    Its positions were trained at 518 px and are interpolated, so the size is the one its image processor makes.
    """

    kind = "dinov2"
    model_class: ClassVar[type[PreTrainedModel]] = Dinov2Model
    any_image_size = True


class Dinov2WithRegistersTower(Dinov2Tower):
    """E.g. facebook/dinov2-with-registers-large (Darcet et al. 2023, https://arxiv.org/abs/2309.16588)."""

    kind = "dinov2_with_registers"
    model_class = Dinov2WithRegistersModel
