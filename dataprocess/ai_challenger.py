"""AI Challenger's image captions: `[{"url": …, "image_id": file name, "caption": [five sentences]}, …]`."""

from __future__ import annotations

import hashlib
from typing import Any

from .messages import shorten
from .records import PLACEHOLDER, RecordError, Sample, check_image, check_text

PROMPTS = (f"这幅图像描述了什么？{PLACEHOLDER}", f"{PLACEHOLDER}这幅图像中有什么？")
"""The two questions asked about these photos, each about half of them."""


def choose_prompt(seed: int, index: int) -> str:
    """Choose a record's question by the configuration's seed and the record's position in its file, from 0.

    Of every two neighbouring records one gets each prompt, and a hash of the seed and the pair's number decides which.
    So n records get n/2 of each (one more of either when n is odd), and rejecting or appending records changes no
    other record's prompt.
    """
    digest = hashlib.blake2b(f"{seed}:{index // 2}".encode(), digest_size=1).digest()
    return PROMPTS[(digest[0] + index) % 2]


def parse(record: Any, index: int, seed: int) -> Sample:
    """Turn one record into a sample that keeps every usable caption, unchanged, as an alternative.

    Args:
        record: the decoded JSON element.
        index: its position in the file, from 0.
        seed: chooses the prompt.

    Returns:
        A sample of one image and one question; captions that are empty or not text are in `left_out`.

    Raises:
        RecordError: a field is missing or of the wrong type, the image name leads outside, or no caption is usable.
    """
    if not isinstance(record, dict):
        raise RecordError("record is not an object", f"got {shorten(record)}")
    missing = [key for key in ("image_id", "caption") if record.get(key) is None]
    if missing:
        raise RecordError(f"no {' and no '.join(missing)}", f"the record has {shorten(sorted(record))}")
    image, captions = check_image(record["image_id"]), record["caption"]
    if not isinstance(captions, list):
        raise RecordError("caption is not a list", f"got {shorten(captions)}")
    usable: list[str] = []
    left_out: list[tuple[int, RecordError]] = []
    for position, caption in enumerate(captions):
        try:
            usable.append(check_text(caption, "caption"))
        except RecordError as error:
            left_out.append((position, error))
    if not usable:
        raise RecordError("no usable caption", f"got {shorten(captions)}")
    return Sample((image,), ((choose_prompt(seed, index), usable),), tuple(left_out))
