"""Grey pictures of more than 8 bits a pixel."""

from __future__ import annotations

import numpy as np
from PIL import Image


def deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of integers or floats to RGB, as `image_io` says.

    Raises:
        ValueError: if it holds values that are not finite.
    """
    values = np.asarray(image)  # (H, W), integers or floats
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    low, high = float(values.min()), float(values.max())
    if image.mode == "I" and image.format == "TIFF" and low >= 0 and high <= 255:  # elsewhere "I" means 16 bits
        grey = values.astype(np.uint8)
    elif image.mode != "F" and low >= 0 and high <= 65535:
        grey = np.rint(np.arange(65536) * (255 / 65535)).astype(np.uint8)[values]
    else:
        grey = np.rint((values - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # PNG: the grey level that stands for "nothing here"
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")
