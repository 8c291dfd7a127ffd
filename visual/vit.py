"""The plain vision transformer (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929)."""

from transformers import ViTModel

from .base import VisionTower


class ViTTower(VisionTower):
    """E.g. google/vit-large-patch16-224-in21k: 224 px, 196 tokens of 1024."""

    kind = "vit"
    model_class = ViTModel
    model_kwargs = {"add_pooling_layer": False}
