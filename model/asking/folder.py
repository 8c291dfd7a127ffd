"""One question about every picture in a folder."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from transformers import set_seed

from dataprocess.image_io import FORMATS, ImageError, load_image

from ..errors import one_line
from .assistant import Assistant

logger = logging.getLogger(__name__)


def check_folder(args: argparse.Namespace) -> None:
    """Refuse what does not go with a folder: other paths, no prompt, a stream."""
    if len(args.image_path) > 1:
        raise ValueError(f"--image_path: the folder {args.folder} must be given alone, without other paths")
    if args.prompt is None:
        raise ValueError("--image_path is a folder, so --prompt is needed; a chat is about one picture")
    if args.stream:
        raise ValueError("--stream shows one answer as it grows, a folder gives a line per picture; leave --stream out")


def pictures_in(folder: Path) -> list[Path]:
    """Return the files of a folder whose extension is that of a picture, by name; refuse a folder without any."""
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in known and path.is_file())
    if not paths:
        raise ValueError(f"{folder}: there is no picture in this folder, no file named *.jpg, *.png or the like")
    return paths


def ask_about_each(assistant: Assistant, prompt: str, paths: Sequence[Path], seed: int) -> int:
    """Print `name<TAB>answer` for every picture; return the number of pictures that can't be read."""
    failed = 0
    for path in paths:
        name = one_line(path.name)
        try:
            features = assistant.features([load_image(path)])
        except ImageError as error:
            logger.error("test.py: %s", error)
            failed += 1
            continue
        set_seed(seed)  # a sampled answer does not depend on the pictures before
        print(f"{name}\t{one_line(assistant.answer(prompt, features, name))}", flush=True)  # noqa: T201
    return failed
