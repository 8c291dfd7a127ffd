"""Every kind of picture and of non-picture: what it becomes, or how it is refused."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataprocess.image_io import ImageError, load_image, resolve_image_path

RED, WHITE = (255, 0, 0), (255, 255, 255)
ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_extreme_shapes(tmp_path, size):
    assert load_image(save(tmp_path, Image.new("RGB", size, RED))).size == size


def test_grey_and_bilevel(tmp_path):
    assert (pixels(save(tmp_path, Image.new("L", (2, 2), 77))) == 77).all()
    assert (pixels(save(tmp_path, Image.new("1", (2, 2), 1))) == 255).all()


@pytest.mark.parametrize(
    ("mode", "clear", "half", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 0, 0, 128), (255, 127, 127)),
        ("LA", (0, 0), (0, 128), (127, 127, 127)),
    ],
)
def test_alpha_lies_on_white(tmp_path, mode, clear, half, expected):
    image = Image.new(mode, (2, 1), clear)
    image.putpixel((1, 0), half)
    got = pixels(save(tmp_path, image))
    assert tuple(got[0, 0]) == WHITE
    assert np.abs(got[0, 1].astype(int) - expected).max() <= 1


def test_transparent_palette_entry_lies_on_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 255, *RED])
    image.putpixel((1, 0), 1)
    for name in ("x.png", "x.gif"):
        got = pixels(save(tmp_path, image, name, transparency=0))
        assert tuple(got[0, 0]) == WHITE
        assert tuple(got[0, 1]) == RED


def test_transparent_colour_lies_on_white(tmp_path):
    image = Image.new("RGB", (2, 1), (0, 0, 255))
    image.putpixel((1, 0), RED)
    got = pixels(save(tmp_path, image, transparency=(0, 0, 255)))
    assert tuple(got[0, 0]) == WHITE
    assert tuple(got[0, 1]) == RED


def test_cmyk(tmp_path):
    got = pixels(save(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "x.jpg", quality=100))
    assert np.abs(got.astype(int) - RED).max() <= 3


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, name):
    values = np.array([[0, 128, 257, 32768, 65535]], dtype=np.uint16)
    got = pixels(save(tmp_path, Image.fromarray(values), name))
    assert got[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert (got[..., 0] == got[..., 2]).all()


def test_deeper_grey_is_stretched(tmp_path):
    integers = np.array([[0, 100_000, 200_000]], dtype=np.int32)
    assert pixels(save(tmp_path, Image.fromarray(integers), "i.tif"))[0, :, 0].tolist() == [0, 128, 255]
    floats = np.array([[-1.0, 0.0, 1.0]], dtype=np.float32)
    assert pixels(save(tmp_path, Image.fromarray(floats), "f.tif"))[0, :, 0].tolist() == [0, 128, 255]
    with pytest.raises(ImageError, match="not finite"):
        load_image(save(tmp_path, Image.fromarray(np.array([[np.nan]], dtype=np.float32)), "nan.tif"))


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path, name, orientation):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = RED
    upright[:16, 16:] = (0, 255, 0)
    # What a camera stores so that turning by `orientation` gives the upright picture: the inverse turn.
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


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png"])
def test_first_frame_of_an_animation(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 0, 255))]
    lossless = {"lossless": True} if name == "x.webp" else {}
    path = save(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **lossless)
    assert (pixels(path) == RED).all()


def test_content_decides_not_the_extension_and_names_may_be_chinese(tmp_path):
    path = tmp_path / "图片.jpg"
    Image.new("RGB", (4, 4), RED).save(path, format="PNG")
    assert (pixels(path) == RED).all()


def bomb(path: Path, side: int) -> Path:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b""))
    return path


def not_pictures(folder: Path) -> dict[str, Path]:
    good = save(folder, Image.effect_noise((200, 200), 50), "good.jpg").read_bytes()
    png = save(folder, Image.effect_noise((200, 200), 50), "good.png").read_bytes()
    cases = {
        "missing": folder / "missing.jpg",
        "empty file": folder / "empty.jpg",
        "a directory": folder / "directory.jpg",
        "not an image": folder / "text.jpg",
        "cut short": folder / "cut.jpg",
        "damaged": folder / "cut.png",
        "too large": bomb(folder / "bomb.png", 20_000),
        "not a regular file": folder / "pipe.jpg",
        "no such file": folder / "good.jpg" / "x.jpg",
    }
    cases["empty file"].touch()
    cases["a directory"].mkdir()
    cases["not an image"].write_text("这不是图片")
    cases["cut short"].write_bytes(good[: len(good) // 2])
    cases["damaged"].write_bytes(png[: len(png) // 2])
    os.mkfifo(cases["not a regular file"])
    return cases


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "empty file",
        "a directory",
        "not an image",
        "cut short",
        "damaged",
        "too large",
        "not a regular file",
        "no such file",
    ],
)
def test_what_is_no_picture_is_refused_with_its_name(tmp_path, kind):
    path = not_pictures(tmp_path)[kind]
    with pytest.raises(ImageError, match=kind) as caught:
        load_image(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.reason in str(caught.value)


@pytest.mark.parametrize("name", ["a\0b.jpg", "a\ud800b.jpg", "x" * 5000])
def test_names_no_file_can_have(tmp_path, name):
    with pytest.raises(ImageError):
        load_image(f"{tmp_path}/{name}")
    with pytest.raises(ImageError):
        load_image(resolve_image_path(tmp_path, name))


def test_formats_that_start_other_programs_are_refused(tmp_path):
    path = tmp_path / "x.eps"
    Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(ImageError, match="not an image"):
        load_image(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path):
    path = save(tmp_path, Image.new("RGB", (4, 4)))
    path.chmod(0)
    with pytest.raises(ImageError, match="unreadable"):
        load_image(path)


def test_error_survives_processes(tmp_path):
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "none.jpg")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.reason) == (str(caught.value), "missing")
    assert isinstance(type(again)(str(again)), ValueError)  # how a data loader raises it again


@pytest.mark.parametrize(
    "name", ["a.jpg", "sub/a.jpg", "./a.jpg", "sub/../a.jpg", "a..b.jpg", "..a/b.jpg", "图/片.jpg"]
)
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
    (real / "beside").symlink_to(tmp_path / "real2")
    assert resolve_image_path(root, "inner") == root / "inner"
    for name in ("outer.jpg", "folder/x.jpg", "beside/x.jpg"):
        with pytest.raises(ImageError, match="allow_links"):
            resolve_image_path(root, name)
        assert resolve_image_path(root, name, allow_links=True) == root / name


def test_needs_no_torch():
    code = "import sys, dataprocess.image_io; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
