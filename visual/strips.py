"""Pictures that are more than 256 times longer than wide."""

from __future__ import annotations

from typing import Any

from PIL import Image


def cut_strip(image: Image.Image, processor: Any) -> Image.Image:
    """Cut a strip to its middle where the image processor would do so after enlarging all of it.

    CLIP's processor enlarges the shorter side to its size: 1 × 5000 pixels would take gigabytes.
    """
    settings = processor.to_dict()
    if not settings.get("do_center_crop") or "shortest_edge" not in (settings.get("size") or {}):
        return image
    width, height = image.size
    x, y = (max(0, (long - 256 * short) // 2) for long, short in ((width, height), (height, width)))
    return image.crop((x, y, width - x, height - y))
