"""DINOv3's vision transformer (Siméoni et al. 2025, https://arxiv.org/abs/2508.10104)."""

from transformers import DINOv3ViTModel, ViTImageProcessorPil

from .base import VisionTower


class Dinov3Tower(VisionTower):
    """E.g. facebook/dinov3-vitl16-pretrain-lvd1689m: 224 px, 196 tokens of 1024.

    Positions are rotary, and four register tokens follow the class token. Its own image processor needs torchvision;
    ViT's takes the same settings. DINOv3's resizes floats and ViT's whole numbers from 0 to 255, so that pixels differ
    by a rounding: less than 1.1 / 255, before mean and deviation.
    """

    kind = "dinov3_vit"
    model_class = DINOv3ViTModel
    processor_class = ViTImageProcessorPil
