"""Finding and opening image files: the one place that decides which files are pictures and what they look like.

Training, inference and the data preparation (``process_image.py --check_images``) all come through here, so that what
was checked is what is trained on. Nothing heavy is imported: Pillow and numpy only.

Every picture becomes 8-bit RGB, as a person would see it in a viewer:

* upright by its EXIF orientation; the first frame of an animation; the colour profile is not applied;
* transparency (an alpha channel, a transparent palette entry or colour) lies on white;
* 16-bit grey is scaled to 8 bits, ``round(v * 255 / 65535)``; 32-bit integers that do not fit in 16 bits, and floats,
  are stretched from their smallest to their largest value;
* the content decides about the format, not the extension of the name.
"""

from __future__ import annotations

import functools
import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 178_956_970
"""Larger pictures (in pixels) are refused as decompression bombs: the level at which Pillow itself refuses them."""

# Pillow also reads formats that start other programs (EPS runs Ghostscript) or that it can only name, not decode.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "MPO", "PPM", "AVIF", "JPEG2000", "ICO")
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

# Between half of MAX_PIXELS and MAX_PIXELS Pillow warns; here a picture is either accepted or refused.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class ImageError(ValueError):
    """A picture that cannot be used. The message names the file; ``reason`` is a short text to count by."""

    reason: str = "unusable image"


def _error(path: str | os.PathLike[str], reason: str, detail: str = "") -> ImageError:
    # Built from one string, so that it survives pickling and the re-raising in a data loader's parent process.
    error = ImageError(f"{os.fspath(path)!r}: {reason}" + (f" ({detail})" if detail else ""))
    error.reason = reason
    return error


@functools.cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # AVIF, for one, is not in every build


def picture_suffixes() -> frozenset[str]:
    """How the names of pictures end that `load_image` can read, as in `.jpg`; in lower case."""
    known = _known_formats()  # before the extensions: it makes Pillow register them
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def pictures_in(folder: Path) -> list[Path]:
    """The files of a folder whose names end as those of pictures do, by name.

    Raises:
        ValueError: if there is none.
    """
    known = picture_suffixes()
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in known and path.is_file())
    if not paths:
        raise ValueError(f"--image_path {folder}: there is no picture in this folder")
    return paths


def check_image_name(name: str) -> str | None:
    """Judge an image name by its text alone, without touching the disk.

    Args:
        name: the name as it stands in an annotation file, relative to the image folder.

    Returns:
        None if the name stays inside its folder, else the short reason why it is refused.
    """
    if not name:
        return "empty image name"
    if "\0" in name:
        return "image name holds a NUL character"
    if name.startswith(("/", "\\")) or (name[1:2] == ":" and name[2:3] in ("/", "\\") and name[0].isalpha()):
        return "image name is absolute"
    if ".." in name:
        depth = 0
        for part in name.replace("\\", "/").split("/"):
            depth += -1 if part == ".." else part not in ("", ".")
            if depth < 0:
                return "image name leads out of its folder"
    return None


def resolve_image_path(root: str | os.PathLike[str], name: str, allow_links: bool = False) -> Path:
    """Join an image folder and a name from an annotation file, never leaving the folder.

    Args:
        root: the image folder; it may itself be a link.
        name: the image's name relative to ``root``.
        allow_links: also accept links that lead out of ``root``.

    Returns:
        ``root/name``. The file need not exist: :func:`load_image` tells.

    Raises:
        ImageError: the name is empty, absolute or climbs out of ``root``, or a link in it resolves outside the real
            ``root`` and ``allow_links`` is not set.
    """
    reason = check_image_name(name)
    if reason is not None:
        raise _error(name, reason, f"it must lie inside {os.fspath(root)!r}")
    path = Path(root, name)
    if not allow_links:
        try:
            real_root = os.path.realpath(root)
            real = os.path.realpath(os.path.join(real_root, name))  # noqa: PTH118 - once per sample: strings are quicker
        except (OSError, ValueError) as exc:  # ValueError: characters that no file name can hold
            raise _error(path, "unreadable", str(exc)) from None
        if real != real_root and not real.startswith(real_root.rstrip(os.sep) + os.sep):
            raise _error(path, "link leads out of its folder", f"to {real!r}; --allow_links accepts such links")
    return path


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Open a picture completely and give it as RGB (see the module's docstring for what that means).

    Args:
        path: the file; its extension does not matter.

    Returns:
        A loaded ``PIL.Image`` of mode "RGB", holding no open file.

    Raises:
        ImageError: the file is missing, a directory or another thing that is not a file, empty, not readable, not a
            picture of a known format, cut short or damaged, or larger than :data:`MAX_PIXELS`.
    """
    path = os.fspath(path)
    _check_file(path)
    try:
        with Image.open(path, formats=_known_formats()) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{width} x {height} pixels")
            image.load()
            return _turn_upright(_to_rgb(image), image)
    except Image.DecompressionBombError as exc:
        raise _error(path, "image too large", f"{exc}; at most {MAX_PIXELS} pixels are accepted") from None
    except UnidentifiedImageError:
        raise _error(path, "not an image", f"none of {', '.join(_known_formats())}") from None
    except PermissionError as exc:
        raise _error(path, "unreadable", exc.strerror or str(exc)) from None
    except MemoryError:
        raise _error(path, "image too large", "not enough memory to decode it") from None
    except Exception as exc:  # decoders of damaged files raise nearly anything: OSError, SyntaxError, struct.error, …
        raise _error(path, "image cut short or damaged", f"{exc}" or type(exc).__name__) from None


def _check_file(path: str) -> None:
    try:
        status = os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        raise _error(path, "missing", "no such file") from None
    except (OSError, ValueError) as exc:  # ValueError: NUL, or characters that no file name can hold
        raise _error(path, "unreadable", getattr(exc, "strerror", None) or str(exc)) from None
    if stat.S_ISDIR(status.st_mode):
        raise _error(path, "a directory, not a file")
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device could wait for ever
        raise _error(path, "not a regular file")
    if status.st_size == 0:
        raise _error(path, "empty file")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey_to_rgb(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    low, high = float(values.min()), float(values.max())
    if image.mode != "F" and low >= 0 and high <= 65535:
        grey = np.rint(np.arange(65536) * (255 / 65535)).astype(np.uint8)[values]
    else:
        grey = np.rint((values - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # PNG: the grey level that stands for "nothing here"
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _turn_upright(rgb: Image.Image, source: Image.Image) -> Image.Image:
    try:
        orientation = source.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # a damaged EXIF block says nothing about the picture, which every viewer shows
        orientation = None
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    upright = rgb if method is None else rgb.transpose(method)
    upright.info = {}  # or saving it would write the old orientation beside the turned pixels
    return upright
