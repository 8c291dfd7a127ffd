"""Features from an earlier block: a published LLaVA mostly reads the hidden state before CLIP's last one.

A tower of L blocks has L + 1 hidden states: what enters the first block, and what each gives. LLaVA's
`vision_feature_layer` counts them from the end: -1 comes out of the last block, -2 out of the one before. Blocks after
that are deleted, so that they take neither time nor memory.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .base import VisionTower


def read_earlier(tower: VisionTower, feature_layer: int) -> None:
    """Make a whole tower give an earlier hidden state, from -2 down; -1 is what it gives anyway.

    Raises:
        ValueError: for a tower other than CLIP and SigLIP, or a hidden state that it does not have.
    """
    delete_later_blocks(tower.model, tower.kind, feature_layer)
    tower.feature_layer = feature_layer


def delete_later_blocks(model: PreTrainedModel, kind: str, feature_layer: int) -> None:
    """Delete the blocks after a hidden state, and SigLIP's norm of the last one; raises as `read_earlier`."""
    vision: Any = getattr(model, "vision_model", model)  # older versions of transformers have this level in between
    layers: Any = getattr(getattr(vision, "encoder", None), "layers", ())
    kept = len(layers) + 1 + feature_layer
    if kind not in ("clip", "siglip") or not 1 <= kept < len(layers):
        raise ValueError(
            f"vision_feature_layer {feature_layer}: the tower is {kind} with {len(layers)} blocks; an earlier layer "
            f"than the last is read from CLIP and SigLIP, from -2 to {-len(layers)}"
        )
    del layers[kept:]
    if kind == "siglip":
        vision.post_layernorm = nn.Identity()
