"""Questions to begin with, about pictures that are drawn here and the one of the repository."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from .words import say

_PHOTO = Path(__file__).resolve().parents[2] / "test_img" / "1.jpg"


@dataclass(frozen=True)
class Example:
    """A question in both languages, and its pictures."""

    key: str
    """Of the question's words."""
    pictures: tuple[Path, ...]

    def question(self, language: str) -> str:
        """Return the question."""
        return say(language, self.key)

    def icon(self) -> Image.Image:
        """Return its pictures side by side, for the page."""
        side = 128
        icon = Image.new("RGB", (side * len(self.pictures), side), "white")
        for number, path in enumerate(self.pictures):
            with Image.open(path) as image:
                icon.paste(image.convert("RGB").resize((side, side)), (side * number, 0))
        return icon


def make_examples(folder: Path) -> list[Example]:
    """Draw the pictures into a folder; return the examples."""
    circle, triangle = folder / "circle.png", folder / "triangle.png"
    draw_shape("circle", (214, 57, 57), (222, 235, 247)).save(circle)
    draw_shape("triangle", (47, 133, 90), (250, 240, 214)).save(triangle)
    examples = [
        Example("example_colour", (circle,)),
        Example("example_shape", (triangle,)),
        Example("example_two", (circle, triangle)),
    ]
    if _PHOTO.is_file():
        examples.append(Example("example_photo", (_PHOTO,)))
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
