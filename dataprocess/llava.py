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

from .messages import format_count, shorten
from .records import PLACEHOLDER, RecordError, Sample, check_image, check_text

_IMAGE = re.compile(r"(?:\r\n|\n|\r)?<image>(?:\r\n|\n|\r)?")


def place_images(question: str) -> tuple[str, int]:
    r"""Replace each `<image>` by the placeholder; return the new question and the number of placeholders.

    `"<image>\nWhat is this?"` and `"What is this?\n<image>"` lose their line break; all other line breaks stay.
    """
    return _IMAGE.subn(PLACEHOLDER, question)


def parse(record: Any) -> Sample:
    """Turn one record, a decoded JSON element, into a sample with all its turns.

    Raises:
        RecordError: a field is missing or of the wrong type, the speakers do not alternate, a text is empty, a question
            holds the placeholder already, an image name leads outside, or `<image>` and images differ in number.
    """
    if not isinstance(record, dict):
        raise RecordError("record is not an object", f"got {shorten(record)}")
    names = record.get("image")
    images = tuple(map(check_image, [] if names is None else names if isinstance(names, list) else [names]))
    texts = _spoken_texts(record.get("conversations"))
    turns: list[tuple[str, str | list[str]]] = []
    count = 0
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        placed, number = place_images(question)
        turns.append((placed, answer))
        count += number
    if count != len(images):
        raise RecordError("<image> and images differ in number", f"{count} in the questions, {len(images)} named")
    return Sample(images, tuple(turns))


def _spoken_texts(turns: Any) -> list[str]:
    """Return the questions and answers of a conversation, in turns."""
    if turns is None:
        raise RecordError("no conversations")
    if not isinstance(turns, list):
        raise RecordError("conversations is not a list", f"got {shorten(turns)}")
    if not turns:
        raise RecordError("conversation is empty")
    texts = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise RecordError("turn without from and value", f"turn {number}: {shorten(turn)}")
        speaker, said = ("gpt", "answer") if number % 2 else ("human", "question")
        if turn["from"] != speaker:
            detail = f"turn {number} is from {shorten(turn['from'])}, not {speaker}"
            raise RecordError("speakers do not alternate", detail)
        texts.append(check_text(turn["value"], said))
        if said == "question" and PLACEHOLDER in texts[-1]:
            raise RecordError(f"question already holds {PLACEHOLDER}", f"turn {number}")
    if len(texts) % 2:
        raise RecordError("last question has no answer", format_count(len(texts), "turn"))
    return texts
