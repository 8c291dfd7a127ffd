"""Scenes of one coloured shape, as in easy-vqa: their content, how they are drawn and how they are described.

Drawing further scenes gives the vision tower more to learn from than the 4,000 training images. Sizes, colours and
backgrounds were measured on the training images; no test image was looked at.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

IMAGE_SIZE = 64
"""Width and height of a picture in pixels."""

COLORS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
"""The data set's colours by name, in RGB."""

SHAPES = ("circle", "rectangle", "triangle")

CHINESE = {
    "black": "黑色",
    "blue": "蓝色",
    "brown": "棕色",
    "gray": "灰色",
    "green": "绿色",
    "red": "红色",
    "teal": "青色",
    "yellow": "黄色",
    "circle": "圆形",
    "rectangle": "长方形",
    "triangle": "三角形",
}

_SMALLEST, _LARGEST = 8.0, 33.0  # sides and diameters in pixels
_OVERSAMPLING = 4  # drawn that much larger, so that edges come out smooth


@dataclass(frozen=True)
class Scene:
    """The content of a picture."""

    shape: str
    """One of `SHAPES`."""
    color: str
    """A key of `COLORS`."""

    @property
    def caption(self) -> str:
        """Return the English caption, e.g. "a blue circle"."""
        return f"a {self.color} {self.shape}"

    @property
    def chinese_captions(self) -> list[str]:
        """Return five Chinese sentences, as many as AI Challenger has for each photo."""
        color, shape = CHINESE[self.color], CHINESE[self.shape]
        return [
            f"图中有一个{color}的{shape}。",
            f"这是一个{color}的{shape}。",
            f"浅色的背景上有一个{color}的{shape}。",
            f"图像里画着一个{shape}，它是{color}的。",
            f"一个{color}的{shape}。",
        ]


def random_scene(rng: random.Random) -> Scene:
    """Choose shape and colour at random, all equally likely."""
    return Scene(rng.choice(SHAPES), rng.choice(list(COLORS)))


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene at a random place and size on a random light background.

    Args:
        scene: what to draw.
        rng: decides size, place and background.

    Returns:
        RGB, `IMAGE_SIZE` pixels wide and high.
    """
    size = IMAGE_SIZE * _OVERSAMPLING
    background = tuple(rng.randint(230, 255) for _ in range(3))
    image = Image.new("RGB", (size, size), background)
    width = rng.uniform(_SMALLEST, _LARGEST) * _OVERSAMPLING
    if scene.shape == "circle":
        height = width
    elif scene.shape == "triangle":
        height = width * math.sqrt(3) / 2  # equilateral
    else:
        height = rng.uniform(_SMALLEST, _LARGEST) * _OVERSAMPLING
    left, top = rng.uniform(0, size - width), rng.uniform(0, size - height)
    right, bottom = left + width, top + height
    pen, fill = ImageDraw.Draw(image), COLORS[scene.color]
    if scene.shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=fill)
    elif scene.shape == "rectangle":
        pen.rectangle((left, top, right, bottom), fill=fill)
    else:
        pen.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=fill)
    return image.reduce(_OVERSAMPLING)
