"""The pixels of every kind of picture, and files and names that are refused."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataprocess import image_io
from dataprocess.image_io import ImageError, load_image, resolve_image_path

RED, WHITE = (255, 0, 0), (255, 255, 255)
RGBA, GREY = 6, 0  # colour types of PNG
ROOT = Path(__file__).parents[2]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes, *chunks: bytes, depth: int = 8, colour: int = GREY) -> bytes:
    """A PNG file of any pixels, which may be too few; `pixels` has a 0 before each row."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(pixels)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data


def saved(image: Image.Image, kind: str, **how) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def jpeg(image: Image.Image, **how) -> bytes:
    return saved(image, "JPEG", **how)


def half_jpeg_with_an_end(share: float, **how) -> bytes:
    """A JPEG file that was cut, and closed by an end marker; libjpeg fills the rest with grey."""
    content = jpeg(Image.effect_noise((200, 200), 50).convert("RGB"), **how)
    return content[: int(len(content) * share)] + b"\xff\xd9"


def jpeg_of_many_scans(number: int) -> bytes:
    """A progressive JPEG file that repeats its last scan."""
    content = jpeg(Image.new("RGB", (16, 16)), progressive=True)
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * number + b"\xff\xd9"


def pixels(path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    assert image.info == {}
    return np.asarray(image)


def save(folder: Path, image: Image.Image, name: str = "x.png", **how) -> Path:
    path = folder / name
    image.save(path, **how)
    return path


def test_rgb_is_untouched(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert (pixels(save(tmp_path, Image.fromarray(values))) == values).all()


@pytest.mark.parametrize(
    "name", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "MPO", "PPM", "AVIF", "JPEG2000", "ICO"]
)
def test_every_format(tmp_path, name):
    Image.init()
    if name not in Image.SAVE:
        pytest.skip(f"this Pillow can't write {name}")
    image = Image.effect_noise((32, 32), 5).convert("RGB")
    how = {"save_all": True, "append_images": [Image.new("RGB", (32, 32), RED)]} if name == "MPO" else {}
    image.save(tmp_path / "picture", name, quality=100, **how)
    with Image.open(tmp_path / "picture") as opened:
        assert opened.format == name
    assert np.abs(pixels(tmp_path / "picture").astype(int) - np.asarray(image)).max() <= 25


@pytest.mark.parametrize(
    ("mode", "clear", "shown", "expected", "how"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 0, 0, 128), (255, 127, 127), {}),
        ("LA", (0, 0), (0, 128), (127, 127, 127), {}),
        ("RGB", (0, 0, 255), RED, RED, {"transparency": (0, 0, 255)}),
        ("P", 0, 1, RED, {"transparency": 0}),
    ],
)
def test_what_is_transparent_lies_on_white(tmp_path, mode, clear, shown, expected, how):
    image = Image.new(mode, (2, 1), clear)
    if mode == "P":
        image.putpalette([0, 0, 255, *RED])
    image.putpixel((1, 0), shown)
    got = pixels(save(tmp_path, image, **how))
    assert tuple(got[0, 0]) == WHITE
    assert np.abs(got[0, 1].astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("name", "kind", "values", "expected"),
    [
        ("x.png", np.uint16, [0, 128, 257, 32768, 65535], [0, 0, 1, 128, 255]),
        ("x.pgm", np.uint16, [0, 128, 257, 32768, 65535], [0, 0, 1, 128, 255]),
        ("x.tif", np.uint16, [257, 32768, 65535], [1, 128, 255]),  # scaled, though nothing is black
        ("x.tif", np.int32, [257, 32768, 65535], [1, 128, 255]),
        ("x.tif", np.int32, [1, 127, 255], [1, 127, 255]),  # 8-bit values, as they are
        ("x.tif", np.int32, [0, 100_000, 200_000], [0, 128, 255]),  # deeper, so stretched
        ("x.tif", np.float32, [-1, 0, 1], [0, 128, 255]),
    ],
)
def test_deep_grey_is_scaled_not_clipped(tmp_path, name, kind, values, expected):
    row = np.array([values], dtype=kind)
    if name == "x.pgm":  # old versions of Pillow read it, but can't write it
        (tmp_path / name).write_bytes(b"P5 5 1 65535\n" + row.astype(">u2").tobytes())
    else:
        save(tmp_path, Image.fromarray(row), name)
    got = pixels(tmp_path / name)
    assert got[0, :, 0].tolist() == expected
    assert (got[..., 0] == got[..., 2]).all()


def test_the_transparent_level_of_16_bit_grey_is_white(tmp_path):
    row = struct.pack(">B3H", 0, 0, 257, 65535)
    for level, expected in ((0, [255, 1, 255]), (257, [0, 255, 255])):
        (tmp_path / "x.png").write_bytes(png(3, 1, row, png_chunk(b"tRNS", struct.pack(">H", level)), depth=16))
        assert pixels(tmp_path / "x.png")[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("name", "orientation"),
    [*(("x.jpg", number) for number in range(1, 9)), *((name, 6) for name in ("x.png", "x.webp", "x.tif"))],
)
def test_exif_orientation_is_applied_once(tmp_path, name, orientation):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = RED
    upright[:16, 16:] = (0, 255, 0)
    # A camera stores the inverse turn, so that turning by `orientation` gives the upright picture.
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(inverse[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if name.endswith("webp") else {"quality": 100} if name.endswith("jpg") else {}
    got = pixels(save(tmp_path, stored, name, exif=exif, **lossless))
    assert got.shape == upright.shape
    for row, column in ((4, 4), (4, 40), (28, 4)):
        assert np.abs(got[row, column].astype(int) - upright[row, column]).max() <= 8


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    path = save(tmp_path, Image.new("RGB", (8, 8), RED), "x.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert np.abs(pixels(path).astype(int) - RED).max() <= 3


@pytest.mark.parametrize("name", ["x.gif", "x.png"])
def test_first_frame_of_an_animation(tmp_path, name):
    second = Image.new("RGB", (8, 8), (0, 0, 255))
    path = save(tmp_path, Image.new("RGB", (8, 8), RED), name, save_all=True, append_images=[second])
    assert (pixels(path) == RED).all()


WHOLE = [
    (mode, size, how)
    for mode, size in (("L", (1, 1)), ("RGB", (17, 31)), ("CMYK", (200, 100)))
    for how in ({}, {"quality": 1}, {"quality": 100}, {"restart_marker_blocks": 1}, {"progressive": True})
]


@pytest.mark.parametrize(("mode", "size", "how"), WHOLE)
def test_whole_jpeg_pictures_are_pillows_own(tmp_path, mode, size, how):
    for deviation in (0, 50):
        noise = np.random.default_rng(0).normal(128, deviation, size[0] * size[1] * 4).clip(0, 255).astype(np.uint8)
        length = len(Image.new(mode, size).tobytes())
        content = jpeg(Image.frombytes(mode, size, noise.tobytes()[:length]), **how)
        (tmp_path / "x.jpg").write_bytes(content + b"what a camera adds \xff\xd8\xff\xd9")
        with Image.open(io.BytesIO(content)) as image:
            assert (pixels(tmp_path / "x.jpg") == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("share", [0.3, 0.99])
@pytest.mark.parametrize("how", [{}, {"restart_marker_blocks": 3}])
def test_a_jpeg_closed_too_early_is_refused(tmp_path, share, how):
    (tmp_path / "x.jpg").write_bytes(half_jpeg_with_an_end(share, **how))
    with pytest.raises(ImageError, match=r"x.jpg.*cut short"):
        load_image(tmp_path / "x.jpg")


NOISE = Image.effect_noise((200, 200), 50).convert("RGB")
FLIPPED = bytearray(saved(NOISE, "PNG"))
FLIPPED[FLIPPED.index(b"IDAT") + 8] ^= 0xFF
NOT_FINITE = Image.fromarray(np.full((2, 4), np.nan, dtype=np.float32))
BOMB = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000)))  # a comment of 200 MB
REFUSED = {
    "empty": (b"", "empty file"),
    "JPEG cut short": (saved(NOISE, "JPEG")[:5000], "cut short"),
    "WebP cut short": (saved(NOISE, "WEBP")[:5000], "cut short"),
    "a flipped bit": (FLIPPED, "cut short or damaged"),
    "a decompression bomb": (png(1, 1, b"\0\0", BOMB), "cut short or damaged"),
    "numbers that are not finite": (saved(NOT_FINITE, "TIFF"), "cut short or damaged"),
    "text": ("这不是图片".encode(), "not an image"),
    "EPS, which runs a program": (saved(NOISE, "EPS"), "not an image"),
}


@pytest.mark.parametrize(("content", "reason"), REFUSED.values(), ids=REFUSED)
def test_no_usable_picture(tmp_path, content, reason):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ImageError, match=rf"x\.png.*{reason}"):
        load_image(tmp_path / "x.png")


def test_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    (tmp_path / "circle").symlink_to("circle")
    refused = {"": "a directory", "pipe": "not a regular file", "none": "missing", "circle": "unreadable"}
    for name, reason in (refused | {"x" * 5000: "unreadable", "a\0": "unreadable", "\ud800": "unreadable"}).items():
        with pytest.raises(ImageError, match=reason):
            load_image(tmp_path / name)


def test_limits(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(png(13_377, 13_377, b"\0", colour=RGBA))
    with pytest.raises(ImageError, match=r"13377 × 13377.*100,000,000 pixels"):
        load_image(path)
    path.write_bytes(jpeg_of_many_scans(3000))
    with pytest.raises(ImageError, match="500 segments"):
        load_image(path)
    path.write_bytes(jpeg_of_many_scans(100))
    assert load_image(path).size == (16, 16)
    monkeypatch.setattr(image_io, "MAX_BYTES", 1000)
    with pytest.raises(ImageError, match="1,000"):
        load_image(path)


def test_error_survives_processes(tmp_path):
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "none.jpg")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.reason) == (str(caught.value), "missing")
    assert isinstance(type(again)(str(again)), ValueError)  # how a data loader raises it again


@pytest.mark.parametrize("name", ["./a.jpg", "sub/../a.jpg", "a..b.jpg", "..a/b.jpg", "图/片.jpg"])
def test_names_inside_are_joined(tmp_path, name):
    assert resolve_image_path(str(tmp_path), name) == tmp_path / name


@pytest.mark.parametrize(
    "name", ["", "../a.jpg", "sub/../../a.jpg", "/etc/passwd", "..", "a\0.jpg", "C:\\a.jpg", "\\\\host\\a", "..\\a.jpg"]
)
def test_names_outside_are_refused(tmp_path, name):
    for allow in (False, True):
        with pytest.raises(ImageError):
            resolve_image_path(str(tmp_path), name, allow_links=allow)


def test_links(tmp_path):
    real, outside = tmp_path / "real", tmp_path / "outside"
    real.mkdir()
    outside.mkdir()
    (tmp_path / "root").symlink_to(real)
    root = tmp_path / "root"
    (real / "inner").symlink_to("target.jpg")
    (real / "outer.jpg").symlink_to(outside / "x.jpg")
    (real / "folder").symlink_to(outside)
    (tmp_path / "real2").mkdir()
    (real / "sibling").symlink_to(tmp_path / "real2")
    assert resolve_image_path(root, "inner") == root / "inner"
    for name in ("outer.jpg", "folder/x.jpg", "sibling/x.jpg"):
        with pytest.raises(ImageError, match="allow_links"):
            resolve_image_path(root, name)
        assert resolve_image_path(root, name, allow_links=True) == root / name
