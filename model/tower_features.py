"""The tower's features of a batch: read from a cache, or computed, or some of each.

Shape legend: N images of the batch in reading order, M of them as pixels, P tokens per image, D the tower's width.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visual.base import VisionTower
from visual.feature_cache import FeatureCache


def tower_features(
    tower: VisionTower,
    cache: FeatureCache | None,
    pixel_values: Tensor | None,
    vision_features: Tensor | None = None,
    has_features: Tensor | None = None,
    image_keys: NDArray[np.uint8] | None = None,
) -> Tensor:
    """Run the tower over those images that come as pixels, and put all features in order.

    Args:
        tower: the tower.
        cache: where what it computes is stored; None: nowhere.
        pixel_values: (M, 3, H, W), or None if there are none.
        vision_features: (N - M, P, D), read from a cache, or None if there are none.
        has_features: (N,) bool, which images these are; all of them if there are no pixels.
        image_keys: (M, 32), what the computed features are stored under; None: they are not.

    Returns:
        (N, P, D).

    Raises:
        ValueError: for features that are not of this tower's shape, or do not add up to N.
    """
    shape = (tower.num_image_tokens, tower.hidden_size)
    if vision_features is not None and tuple(vision_features.shape[1:]) != shape:
        raise ValueError(f"vision_features must have shape (N, {shape[0]}, {shape[1]}), got {vision_features.shape}")
    if pixel_values is None:
        if vision_features is None:
            raise ValueError("there are neither pixel_values nor vision_features")
        return vision_features
    # Where each goes, the host asks before the tower runs: afterwards it would have to wait for it.
    places = None if vision_features is None else _places(has_features, len(vision_features), len(pixel_values))
    computed = tower(pixel_values)
    del cache, image_keys
    if places is None or vision_features is None:
        return computed
    # float32 holds whatever either of them is in.
    features = computed.new_empty((len(pixel_values) + len(vision_features), *shape), dtype=torch.float32)
    for place, some in zip(places, (vision_features, computed), strict=True):
        features.index_copy_(0, place, some.float())
    return features


def _places(has_features: Tensor | None, num_stored: int, num_computed: int) -> tuple[Tensor, Tensor]:
    """Positions among all images of those that `has_features` marks, (num_stored,), and of the others."""
    if has_features is not None and len(has_features) == num_stored + num_computed:
        places = has_features.nonzero()[:, 0], (~has_features).nonzero()[:, 0]
        if len(places[0]) == num_stored:
            return places
    raise ValueError(
        f"has_features must mark {num_stored} of {num_stored + num_computed} images, those that vision_features are of"
    )
