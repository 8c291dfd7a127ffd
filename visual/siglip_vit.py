"""SigLIP's vision transformer (Zhai et al. 2023, https://arxiv.org/abs/2303.15343), and SigLIP 2's of fixed size."""

from transformers import SiglipVisionModel

from .base import VisionTower


class SiglipTower(VisionTower):
    """Any SigLIP ViT, e.g. google/siglip-so400m-patch14-384: 384 px, 729 tokens of 1152.

    The last hidden state has gone through the final layer norm. There is no class token, so every token is a patch.
    The original project removed the first one nevertheless: what it trained needs `drop_first_patch`.
    """

    kind = "siglip"
    model_class = SiglipVisionModel
    num_prefix_tokens = 0
    config_overrides = {"vision_use_head": False}  # the pooling head has weights of its own and is not used here
    may_drop_first_patch = True
