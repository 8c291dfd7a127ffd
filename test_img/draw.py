"""Draw the picture that `test.sh` asks about, six plainly coloured, labelled shapes on white:

python test_img/draw.py [FILE]      # FILE: 1.jpg beside this script
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 660, 660  # square, so that a tower that crops the middle sees all of it
"""Size of the picture in pixels."""
SHAPES = [
    # label, colour, shape; three to a row
    ("red", (220, 20, 30), "circle"),
    ("green", (20, 160, 50), "rectangle"),
    ("blue", (25, 70, 220), "triangle"),
    ("yellow", (255, 215, 0), "rectangle"),
    ("black", (0, 0, 0), "circle"),
    ("orange", (255, 130, 0), "triangle"),
]


def shape_centres() -> list[tuple[int, int]]:
    """The centre (x, y) of each of `SHAPES`, in pixels."""
    return [(110 + 220 * (index % 3), 155 + 320 * (index // 3)) for index in range(len(SHAPES))]


def draw_picture() -> Image.Image:
    """The picture, RGB; the font is the one that comes with Pillow, so that it is the same everywhere."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=30)
    for (label, colour, shape), (x, y) in zip(SHAPES, shape_centres(), strict=True):
        if shape == "circle":
            draw.ellipse((x - 80, y - 80, x + 80, y + 80), fill=colour)
        elif shape == "rectangle":
            draw.rectangle((x - 80, y - 80, x + 80, y + 80), fill=colour)
        else:
            draw.polygon([(x, y - 85), (x - 90, y + 80), (x + 90, y + 80)], fill=colour)
        draw.text((x, y + 108), label, fill=(60, 60, 60), font=font, anchor="mm")
    return picture


def main() -> None:
    """Draw the picture and write it."""
    parser = argparse.ArgumentParser(description="Draw the picture that test.sh asks about.")
    parser.add_argument("file", nargs="?", type=Path, default=Path(__file__).with_name("1.jpg"), help="file to write")
    draw_picture().save(parser.parse_args().file, quality=95, subsampling=0)


if __name__ == "__main__":
    main()
