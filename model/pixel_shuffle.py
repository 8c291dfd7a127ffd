"""`--pixel_shuffle f`: f × f neighbouring patches become one token before the projector reads them."""

from __future__ import annotations

import math

from torch import Tensor


def shuffle_pixels(features: Tensor, factor: int) -> Tensor:
    """Join blocks of f × f neighbouring patches: fewer tokens for the language model to read, each of them wider.

    Patches are the cells of a square grid, row by row, and so are the tokens; a token holds its patches row by row. No
    value is lost.

    Args:
        features: (N, P, W), P patches of each image.
        factor: f; `check_pixel_shuffle` says which fit.

    Returns:
        (N, P / f², f² · W).
    """
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
