"""Odd pictures: each goes through preparation, training and answering, with the outcome that `IMAGES` names."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import GOOD, answer, answer_batch, llava, prepare, train_on_all
from odd_pictures import RGBA, half_jpeg_with_an_end, jpeg_of_many_scans, png, png_chunk
from PIL import Image

RED, GREEN = (255, 0, 0), (0, 255, 0)
READ = "read: the path is the user's own"
NO_WORD = "no command line can hold it"
Maker = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """A picture, and what becomes of it.

    Args:
        what: a description.
        make: writes the file.
        name: its name in the annotations.
        refused: why it can't be used, as `--check_images`, training and test.py say; empty: it can.
        refused_by_name: why its name alone is refused, also without `--check_images`; test.py takes any path.
        size: width and height it is seen with.
        corner: colour of its upper left pixel as it is seen.
        test_py: the outcome in test.py, where it differs: `READ`, `NO_WORD`, or a part of the message.
        batch: a part of what `test.py --batch` says, where that is neither as in test.py nor, if no command line can
            hold it, as in training.
    """

    what: str
    make: Maker
    name: str = "x.png"
    refused: str = ""
    refused_by_name: str = ""
    size: tuple[int, int] = (4, 2)
    corner: tuple[int, int, int] = RED
    test_py: str = ""
    batch: str = ""


def save(colour: object = RED, mode: str = "RGB", size: tuple[int, int] = (4, 2), **how: object) -> Maker:
    return lambda path: Image.new(mode, size, colour).save(path, **how)  # type: ignore[arg-type]


def write(content: bytes) -> Maker:
    return lambda path: path.write_bytes(content)


def cut(share: float, **how: object) -> Maker:
    def make(path: Path) -> None:
        Image.effect_noise((200, 200), 50).convert("RGB").save(path, **how)  # type: ignore[arg-type]
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return make


def text_bomb(path: Path) -> None:
    """A compressed comment that unpacks to 200 MB in a harmless picture."""
    save()(path)
    content = path.read_bytes()
    comment = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 200_000_000))
    path.write_bytes(content[:33] + comment + content[33:])


def flip_a_bit(path: Path) -> None:
    save()(path)
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 8] ^= 0xFF
    path.write_bytes(content)


def turned(path: Path) -> None:
    """A picture on its side; upright, it is red above green."""
    stored = Image.new("RGB", (64, 32), GREEN)
    stored.paste(RED, (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    stored.save(path, format="JPEG", quality=100, exif=exif)


def not_finite(path: Path) -> None:
    Image.fromarray(np.full((2, 4), np.nan, dtype=np.float32)).save(path)


def outside(path: Path) -> Path:
    target = path.parent.parent / "outside.png"
    save()(target)
    return target


def link_outside(path: Path) -> None:
    path.symlink_to(outside(path))


def link_inside(path: Path) -> None:
    save()(path.with_name("target.png"))
    path.symlink_to("target.png")


def link_in_a_circle(path: Path) -> None:
    path.symlink_to(path.name)


def nothing(path: Path) -> None:
    """There is no such file."""


def unreadable(path: Path) -> None:
    save()(path)
    path.chmod(0)


CUT, ABSENT, NO_IMAGE = "image cut short or damaged", "missing", "not an image"
LINK = "link leads out of its folder"
IMAGES = [
    # Not usable
    Case("missing", nothing, refused=ABSENT),
    Case("empty", write(b""), refused="empty file"),
    Case("cut short, JPEG", cut(0.5, format="JPEG"), "x.jpg", refused=CUT),
    Case("cut short, WebP", cut(0.5, format="WEBP"), "x.webp", refused=CUT),
    Case("cut short, JPEG closed by an end marker", write(half_jpeg_with_an_end()), "x.jpg", refused=CUT),
    Case("a bit has flipped in its data", flip_a_bit, refused=CUT),
    Case("not an image: text", write("这不是图片".encode()), refused=NO_IMAGE),
    Case("SVG, which names other files", write(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), refused=NO_IMAGE),
    Case("EPS, which runs a program", save(format="EPS"), "x.eps", refused=NO_IMAGE),
    Case("a folder", lambda path: path.mkdir(), refused="a directory, not a file", test_py="there is no picture"),
    Case("unreadable", unreadable, refused="unreadable"),
    Case("a pipe", lambda path: os.mkfifo(path), refused="not a regular file"),
    Case("a link to itself", link_in_a_circle, refused="unreadable"),
    Case("900 million pixels in 100 bytes", write(png(30_000, 30_000, bytes(100))), refused="image too large"),
    Case("179 million pixels with alpha", write(png(13_377, 13_377, b"", colour=RGBA)), refused="image too large"),
    Case("JPEG of 3,000 scans", write(jpeg_of_many_scans(3000)), "x.jpg", refused="image too large"),
    Case("a decompression bomb in a comment", text_bomb, refused=CUT),
    Case("floats that are not finite", not_finite, "x.tif", refused=CUT),
    # Usable, each in its own way
    Case("1 × 1", save(size=(1, 1)), size=(1, 1)),
    Case("RGBA, half transparent: on white", save((255, 0, 0, 128), "RGBA"), corner=(255, 127, 127)),
    Case("CMYK", save((0, 255, 255, 0), "CMYK", (16, 16), quality=100), "x.jpg", size=(16, 16)),
    Case("EXIF-rotated: turned upright", turned, "x.jpg", size=(32, 64)),
    Case("wrong extension: a PNG called .jpg", save(format="PNG"), "x.jpg"),
    # Names
    Case("a name in Chinese", save(), "图片 一.png"),
    Case("a name with a line break and quotes", save(), "a\n\"b'.png"),
    Case("a name that begins with a hyphen", save(), "-x.png"),
    Case("a name of 5,000 characters", nothing, "x" * 5000, refused="unreadable", test_py="File name too long"),
    Case("an empty name", nothing, "", refused_by_name="image name", test_py=NO_WORD, batch="the image is"),
    Case("a name that climbs out: ../", outside, "../outside.png", refused_by_name="leads out", test_py=READ),
    Case("an absolute name", nothing, "/etc/hostname", refused_by_name="absolute", test_py="not an image"),
    Case("an absolute name of Windows", nothing, "C:\\x.png", refused_by_name="absolute", test_py="missing"),
    Case("a name with NUL", nothing, "a\0.png", refused_by_name="NUL", test_py=NO_WORD, batch="unreadable"),
    Case(
        "half of a surrogate pair in the name",
        nothing,
        "a\ud800.png",
        refused="unreadable",
        refused_by_name="surrogate",
        test_py=NO_WORD,
    ),
    Case("a link that leads out", link_outside, refused=LINK, test_py=READ),
    Case("a link inside", link_inside),
    Case("an https address", nothing, "https://example.com/x.png", refused=ABSENT),
]


@pytest.mark.parametrize("case", IMAGES, ids=[case.what for case in IMAGES])
def test_picture(case: Case, tmp_path, tokenizer, capsys):
    images = tmp_path / "images"
    images.mkdir()
    save(size=(3, 3))(images / GOOD)
    writable = case.make is not nothing and ".." not in Path(case.name).parts
    case.make(images / (case.name if writable else "unused.png"))
    if case.make is unreadable and os.access(images / case.name, os.R_OK):
        pytest.skip("root may read everything")
    prepared(case, tmp_path)
    reason = case.refused or case.refused_by_name
    seen = trained_on(case, tmp_path, tokenizer, reason)
    if case.test_py != NO_WORD:
        path = case.name if case.name.startswith("/") else images / case.name
        said, assistant = answer(path, "What?", tokenizer, capsys)
        if case.test_py == READ or not reason:
            assert said == ""
        else:
            assert (case.test_py or reason) in said
            assert not assistant.ids
        seen += assistant.images
    path = case.name if case.name.startswith("/") else f"{images}/{case.name}" if case.name else ""
    said, assistant = answer_batch(tmp_path, path, tokenizer)
    expected = of_batch(case)
    assert bool(said) == bool(expected)
    assert expected in said
    seen += assistant.images
    for picture in seen:
        assert tuple(picture.shape) == (3, case.size[1], case.size[0])
        assert np.abs(picture[:, 0, 0].numpy() - case.corner).max() <= 3, picture[:, 0, 0]
        assert torch.equal(picture, seen[0]), "training and answering see the same"


def of_batch(case: Case) -> str:
    """What `test.py --batch` says is wrong with a picture ("" if nothing)."""
    if case.batch or case.test_py == READ:
        return case.batch
    return case.refused or (case.test_py if case.test_py != NO_WORD else case.refused_by_name)


def prepared(case: Case, folder: Path) -> None:
    records = [llava(GOOD, "<image>\nA?", "good"), llava(case.name, "<image>\nB?", "hostile")]
    for flags, reason in (((), case.refused_by_name), (("--check_images",), case.refused_by_name or case.refused)):
        status, captions, rejects = prepare(folder, json.dumps(records).encode(), *flags)
        assert status == 0
        assert [caption["a"] for caption in captions] == (["good"] if reason else ["good", "hostile"]), flags
        assert [line["record"] for line in rejects] == ([1] if reason else [])
        if reason:
            assert reason in rejects[0]["reason"]


def trained_on(case: Case, folder: Path, tokenizer, reason: str) -> list[torch.Tensor]:
    """Train on files that somebody else prepared; returns the picture as it is seen."""
    names = {"0": GOOD, "1": case.name}
    entries = {key: {"image_file": name, "ID": int(key), "path": str(folder / "images")} for key, name in names.items()}
    (folder / "image_map.json").write_text(json.dumps(entries))
    (folder / "captions.json").write_text(json.dumps({key: {"q": "<|extra_0|>", "a": "B"} for key in names}))
    problem, samples = train_on_all(folder, tokenizer)
    assert [sample["id"] for sample in samples] == ([0] if reason else [0, 1])
    if not reason:
        assert problem == ""
        return [samples[1]["pixel_values"][0]]
    assert "sample 1: " in problem
    assert reason in problem
    return []
