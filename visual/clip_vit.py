"""CLIP's vision transformer (Radford et al. 2021, https://arxiv.org/abs/2103.00020)."""

from transformers import CLIPVisionModel

from .base import VisionTower


class CLIPTower(VisionTower):
    """Any CLIP ViT, e.g. openai/clip-vit-large-patch14: 224 px, 256 tokens of 1024.

    The last hidden state is taken before CLIP's final layer norm, which is meant for the class token alone.
    """

    kind = "clip"
    model_class = CLIPVisionModel
