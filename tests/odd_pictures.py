"""Bytes of pictures that no ordinary program writes."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

RGBA, GREY = 6, 0  # colour types of PNG


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes, *chunks: bytes, depth: int = 8, colour: int = GREY) -> bytes:
    """A PNG file of any pixels, which may be too few; `pixels` has a 0 before each row."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(pixels)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data


def jpeg(image: Image.Image, **how: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **how)
    return file.getvalue()


def half_jpeg_with_an_end(share: float = 0.5, **how: object) -> bytes:
    """A JPEG file that was cut, and closed by an end marker; libjpeg fills the rest with grey."""
    content = jpeg(Image.effect_noise((200, 200), 50).convert("RGB"), **how)
    return content[: int(len(content) * share)] + b"\xff\xd9"


def jpeg_of_many_scans(number: int) -> bytes:
    """A progressive JPEG file that repeats its last scan."""
    content = jpeg(Image.new("RGB", (16, 16)), progressive=True)
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * number + b"\xff\xd9"
