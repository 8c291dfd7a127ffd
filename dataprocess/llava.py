"""LLaVA's instruction data.

    [{"id": …, "image": name, "conversations": [{"from": "human"|"gpt", "value": …}, …]}, …]

`image` may be absent or null (a conversation about no image) or a list (several images). Each `<image>` in a human
turn stands for one image; it becomes the placeholder, without a line break on either side. In gpt turns
`<image>` is ordinary text. Conversations begin with human, alternate, and end with gpt; anything else, system turns
included (training sets its own system prompt), is rejected.
"""

from __future__ import annotations

import re
from typing import Any

from .messages import shorten
from .records import PLACEHOLDER, RecordError, Sample, check_image, check_text

_IMAGE = re.compile(r"(?:\r\n|\n|\r)?<image>(?:\r\n|\n|\r)?")


def place_images(question: str) -> tuple[str, int]:
    r"""Replace each `<image>`, and a line break right before or right after it, by the placeholder.

    `"<image>\nWhat is this?"` and `"What is this?\n<image>"` lose their line break; all other line breaks stay.

    Returns:
        The question with placeholders, and their number.
    """
    return _IMAGE.subn(PLACEHOLDER, question)


def parse(record: Any) -> Sample:
    """Turn one record into a sample with all its turns.

    Args:
        record: the decoded JSON element.

    Returns:
        A sample of as many images as the questions have placeholders, possibly none.

    Raises:
        RecordError: a field is missing or of the wrong type, the speakers do not alternate, a text is empty, a question
            holds the placeholder already, an image name leads outside, or `<image>` and images differ in number.
    """
    if not isinstance(record, dict):
        raise RecordError("record is not an object", f"got {shorten(record)}")
    images = _image_names(record.get("image"))
    turns = _turns(record.get("conversations"))
    placed: list[tuple[str, str | list[str]]] = []
    count = 0
    for question, answer in turns:
        question, number = place_images(question)
        placed.append((question, answer))
        count += number
    if count != len(images):
        raise RecordError("<image> and images differ in number", f"{count} in the questions, {len(images)} named")
    return Sample(images, tuple(placed))


def _image_names(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return tuple(map(check_image, value)) if isinstance(value, list) else (check_image(value),)


def _turns(value: Any) -> list[tuple[str, str]]:
    if value is None:
        raise RecordError("no conversations")
    if not isinstance(value, list):
        raise RecordError("conversations is not a list", f"got {shorten(value)}")
    if not value:
        raise RecordError("conversation is empty")
    texts = [_spoken(turn, number) for number, turn in enumerate(value)]
    if len(texts) % 2:
        raise RecordError("last question has no answer", f"{len(texts)} turn{'s' * (len(texts) > 1)}")
    return list(zip(texts[::2], texts[1::2], strict=True))


def _spoken(turn: Any, number: int) -> str:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise RecordError("turn without from and value", f"turn {number}: {shorten(turn)}")
    speaker = "gpt" if number % 2 else "human"
    if turn["from"] != speaker:
        raise RecordError("speakers do not alternate", f"turn {number} is from {shorten(turn['from'])}, not {speaker}")
    text = check_text(turn["value"], "question" if speaker == "human" else "answer")
    if speaker == "human" and PLACEHOLDER in text:
        raise RecordError(f"question already holds {PLACEHOLDER}", f"turn {number}")
    return text
