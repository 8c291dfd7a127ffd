"""Questions to begin with, about pictures that are drawn here and the one of the repository."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from dataprocess.image_io import load_image

from .words import say

_PHOTO = Path(__file__).resolve().parents[2] / "test_img" / "1.jpg"


@dataclass(frozen=True)
class Example:
    """A question in both languages, and its pictures."""

    key: str
    """Of the question's words."""
    pictures: tuple[Image.Image, ...]

    def question(self, language: str) -> str:
        """Return the question."""
        return say(language, self.key)

    def icon(self) -> Image.Image:
        """Return its pictures side by side in a square, for the page."""
        whole = 256
        side = whole // len(self.pictures)
        icon = Image.new("RGB", (whole, whole), "white")
        for number, image in enumerate(self.pictures):
            icon.paste(image.resize((side, side)), (side * number, (whole - side) // 2))
        return icon


def make_examples() -> list[Example]:
    """Draw the pictures; return the examples."""
    circle = draw_shape("circle", (214, 57, 57), (222, 235, 247))
    triangle = draw_shape("triangle", (47, 133, 90), (250, 240, 214))
    examples = [
        Example("example_colour", (circle,)),
        Example("example_shape", (triangle,)),
        Example("example_two", (circle, triangle)),
    ]
    if _PHOTO.is_file():
        examples.append(Example("example_photo", (load_image(_PHOTO),)))
    return examples


def draw_shape(
    shape: str, colour: tuple[int, int, int], background: tuple[int, int, int], size: int = 256
) -> Image.Image:
    """Draw one shape on a plain background, smooth at its edges."""
    large = Image.new("RGB", (4 * size, 4 * size), background)
    left, right, middle = size, 3 * size, 2 * size
    draw = ImageDraw.Draw(large)
    if shape == "circle":
        draw.ellipse((left, left, right, right), fill=colour)
    else:
        draw.polygon([(middle, left), (right, right), (left, right)], fill=colour)
    return large.resize((size, size), Image.Resampling.LANCZOS)
