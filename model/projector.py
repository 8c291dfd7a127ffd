"""The projector: maps patch features from the vision tower's space into the language model's."""

from __future__ import annotations

import math

from torch import Tensor, nn

INIT_STD = 0.01


def build_projector(vision_dim: int, language_dim: int, num_layers: int = 2) -> nn.Sequential:
    """Build a freshly initialised projector, in fp32; it maps (N, P, vision_dim) to (N, P, language_dim).

    Two layers with a GELU in between are those of LLaVA-1.5 (https://arxiv.org/abs/2310.03744); one layer is the first
    Linear alone. Weights are drawn from N(0, 0.01²), biases are 0. The state dict's names are `0.weight 0.bias` and,
    with two layers, `2.weight 2.bias`.

    Args:
        vision_dim: channels of a patch feature.
        language_dim: channels of the language model's embedding.
        num_layers: linear layers, 1 or 2.

    Raises:
        ValueError: if `num_layers` is neither.
    """
    if num_layers not in (1, 2):
        raise ValueError(f"the projector has 1 or 2 layers, not {num_layers}")
    layers: list[nn.Module] = [nn.Linear(vision_dim, language_dim)]
    if num_layers == 2:
        layers += [nn.GELU(), nn.Linear(language_dim, language_dim)]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=INIT_STD)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def pixel_shuffle(features: Tensor, factor: int) -> Tensor:
    """Join blocks of f × f neighbouring patches: fewer tokens for the language model to read, each of them wider.

    Patches are the cells of a square grid, row by row, and so are the tokens; a token holds its patches row by row. No
    value is lost. f = 1 changes nothing.

    Args:
        features: (N, P, W), P patches of each image.
        factor: f; `check_pixel_shuffle` says which fit.

    Returns:
        (N, P / f², f² · W).
    """
    if factor == 1:
        return features
    N, P, W = features.shape
    side = math.isqrt(P) // factor  # tokens in a row of the grid
    blocks = features.reshape(N, side, factor, side, factor, W).transpose(2, 3)  # (N, side, side, f, f, W)
    return blocks.reshape(N, side * side, factor * factor * W)


def check_pixel_shuffle(factor: int, num_patches: int) -> None:
    """Refuse a factor that does not divide the grid of patches; 1 always fits.

    Raises:
        ValueError: with the factors that fit.
    """
    side = math.isqrt(num_patches)
    if factor != 1 and side * side != num_patches:
        raise ValueError(
            f"--pixel_shuffle {factor}: the vision tower gives {num_patches} tokens, which are no square grid (SigLIP "
            "without its first patch); leave it out"
        )
    if factor < 1 or side % factor:
        fitting = ", ".join(str(number) for number in range(1, side + 1) if side % number == 0)
        raise ValueError(
            f"--pixel_shuffle {factor}: does not divide the vision tower's grid of {side} × {side} patches; give one "
            f"of {fitting}"
        )
