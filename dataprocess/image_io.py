"""Find and open image files: the one place that decides which files are pictures and what they look like.

Training, answering and `process_image.py --check_images` all open pictures here, so they all see the same.

Every picture becomes 8-bit RGB, as a person would see it in a viewer:

* upright by its EXIF orientation; the first frame of an animation; the colour profile is not applied;
* transparency (an alpha channel, a transparent palette entry or colour) on white;
* 16-bit grey scaled to 8 bits, `round(v * 255 / 65535)`; 32-bit integers as they are where all fit in 8 bits, scaled
  likewise where they fit in 16; other integers, and floats, stretched from their smallest to their largest value;
* decoded by its content; the extension of its name does not matter.

Pictures of more than `MAX_PIXELS` pixels or `MAX_BYTES` bytes and JPEG files of more than `MAX_SEGMENTS` segments are
refused, and so are pictures that are cut short or damaged. Two kinds of damage go unnoticed: wrong bits in formats
without checksums (JPEG, BMP), and a progressive JPEG that lacks its last scans, which looks blurred.
"""

from __future__ import annotations

import io
import os
import re
import stat
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from .deep_grey import deep_grey_to_rgb

MAX_PIXELS = 100_000_000
"""Pixels of the largest picture accepted (10,000 × 10,000): opening it takes about a gigabyte."""
MAX_BYTES = 256 * 2**20
"""Size of the largest file accepted."""
MAX_SEGMENTS = 500
"""Segments of the longest JPEG file accepted; each scan and each piece of EXIF data costs time."""

Image.init()  # makes Pillow load its formats and the extensions of their files
_ALLOWED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "MPO", "PPM", "AVIF", "JPEG2000", "ICO")
FORMATS = tuple(name for name in _ALLOWED if name in Image.OPEN)  # AVIF, for one, is not in every build
"""Pillow's names of the formats accepted; others start programs (EPS runs Ghostscript), or can't be decoded."""
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A marker of a JPEG file that has a length; 0xff followed by 0 is data, by 0xff it is filling.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # here a picture is accepted or refused
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # a line for each odd EXIF tag


class ImageError(ValueError):
    """A picture that cannot be used. The message names the file; `reason` is a short text to count by."""

    reason: str = "unusable image"


def image_error(path: str | os.PathLike[str], reason: str, detail: str = "") -> ImageError:
    """Describe what is wrong with a picture."""
    # Built from one string, so that it survives pickling and the re-raising in a data loader's parent process.
    error = ImageError(f"{os.fspath(path)!r}: {reason}" + (f" ({detail})" if detail else ""))
    error.reason = reason
    return error


def check_image_name(name: str) -> str | None:
    """Return why a name from an annotation file is refused, or None if it stays inside its folder; no disk is used."""
    if not name:
        return "empty image name"
    if "\0" in name:
        return "image name holds a NUL character"
    if name.startswith(("/", "\\")) or (name[1:2] == ":" and name[2:3] in ("/", "\\") and name[0].isalpha()):
        return "image name is absolute"
    depth = 0
    for part in name.replace("\\", "/").split("/"):
        depth += -1 if part == ".." else part not in ("", ".")
        if depth < 0:
            return "image name leads out of its folder"
    return None


def resolve_image_path(root: str | os.PathLike[str], name: str, allow_links: bool = False) -> Path:
    """Join an image folder, which may be a link, and a name from an annotation file; the file may be missing.

    Raises:
        ImageError: the name is empty, absolute or climbs out of `root`, or a link in it does, unless that is allowed.
    """
    reason = check_image_name(name)
    if reason:
        raise image_error(name, reason, f"it must be inside {os.fspath(root)!r}")
    path = Path(root, name)
    if not allow_links:
        try:
            real_root = os.path.realpath(root)
            real = os.path.realpath(os.path.join(real_root, name))  # noqa: PTH118 - once per sample: strings are quicker
        except ValueError as exc:  # characters that no file name can hold
            raise image_error(path, "unreadable", str(exc)) from None
        if os.path.commonpath((real_root, real)) != real_root:
            raise image_error(path, "link leads out of its folder", f"to {real!r}; --allow_links accepts such links")
    return path


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Open a picture completely and convert it to RGB; the module's docstring says how.

    No file stays open, except shards: `path` may also be the place of a picture in a tar file, as `shards.py` names it.

    Raises:
        ImageError: the file is missing, a directory or no regular file, empty, unreadable, not a picture of a known
            format, cut short or damaged, or too large.
    """
    path = os.fspath(path)
    stored = read_from_shard(path) if ".tar/" in path else None
    if stored is None:
        check_file(path)
    try:
        with Image.open(_open_file(path, stored), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{width} × {height} pixels")
            image.load()
            return _upright_rgb(image)
    except (Image.DecompressionBombError, MemoryError) as exc:
        problem = str(exc) or "not enough memory to decode it"
        raise image_error(path, "image too large", f"{problem}; at most {MAX_PIXELS:,} pixels are accepted") from None
    except UnidentifiedImageError:
        raise image_error(path, "not an image", f"none of {', '.join(FORMATS)}") from None
    except PermissionError as exc:
        raise image_error(path, "unreadable", exc.strerror or str(exc)) from None
    except ImageError:
        raise
    except Exception as exc:  # decoders of damaged files raise nearly anything: OSError, SyntaxError, struct.error, …
        raise image_error(path, "image cut short or damaged", f"{exc}" or type(exc).__name__) from None


def read_from_shard(path: str) -> bytes | None:
    """Read a picture that is stored in a tar shard; None if the path is not the name of such a place."""
    from .shards import ShardError, read_member

    try:
        return read_member(path, MAX_BYTES)
    except ShardError as exc:
        raise image_error(path, exc.reason, exc.detail) from None


def check_file(path: str) -> None:
    """Refuse what is no regular file, is empty or too large."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        raise image_error(path, "missing", "no such file") from None
    except (OSError, ValueError) as exc:  # ValueError: NUL, or characters that no file name can hold
        raise image_error(path, "unreadable", getattr(exc, "strerror", None) or str(exc)) from None
    if stat.S_ISDIR(status.st_mode):
        raise image_error(path, "a directory, not a file")
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device could wait for ever
        raise image_error(path, "not a regular file")
    if status.st_size == 0:
        raise image_error(path, "empty file")
    if status.st_size > MAX_BYTES:
        raise image_error(path, "image too large", f"{status.st_size:,} bytes; at most {MAX_BYTES:,} are accepted")


def _open_file(path: str, stored: bytes | None) -> io.BytesIO | str:
    """Return a picture as Pillow takes it, a JPEG file so that missing data are an error.

    If the end marker comes too early, libjpeg fills the rest of the picture with grey. Without the marker, Pillow calls
    the file cut short unless it has decoded all rows. The zeros in its place are for the decoder, which looks ahead.
    """
    with open(path, "rb") if stored is None else io.BytesIO(stored) as file:  # noqa: PTH123
        if file.read(3) != b"\xff\xd8\xff":
            return path if stored is None else io.BytesIO(stored)
        data = b"\xff\xd8\xff" + file.read()
    at, kinds = 2, bytearray()  # where to look for the next marker; the markers so far
    while (marker := _JPEG_MARKER.search(data, at)) and marker[1] != b"\xd9":  # up to the end marker
        kinds += marker[1]
        if len(kinds) > MAX_SEGMENTS:
            raise image_error(path, "image too large", f"a JPEG of more than {MAX_SEGMENTS} segments")
        length = data[marker.end() : marker.end() + 2]
        at = marker.end() + int.from_bytes(length, "big")
    if marker and kinds.count(0xDA) == 1:  # several scans are decoded only when the end marker has come
        data = data[: marker.start()] + bytes(64)
    return io.BytesIO(data)


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded picture to 8-bit RGB, put it on white where it is transparent, and turn it upright."""
    if image.mode.startswith("I") or image.mode == "F":
        rgb = deep_grey_to_rgb(image)
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image if image.mode == "RGBA" else image.convert("RGBA"))
        rgb = white.convert("RGB")
    else:
        rgb = image.convert("RGB")
    try:
        turn = _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block says nothing about the picture, which every viewer shows
        turn = None
    upright = rgb if turn is None else rgb.transpose(turn)
    upright.info = {}  # or saving it would write the old orientation next to the turned pixels
    return upright
