"""A conversation as Gradio's chatbot shows it: Markdown, in which nothing becomes active that should not."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

from .questions import Asked
from .words import say

_ACTIVE = re.compile(r"[\\`*_{}\[\]<>#|~$&]|^(?:[-+=]|\d+[.)])|^ {4,}|^\t+", re.M)
ESCAPED = r"\\([\\`*_{}\[\]<>#|~$&+=.)-])"
"""What the page replaces by the character alone when a visitor edits a question."""
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.S)


def escape(question: str) -> str:
    """Return Markdown that shows a text as it was typed."""

    def inert(match: re.Match[str]) -> str:
        found = match[0]
        if not found.strip():
            return "\u00a0" * len(found.expandtabs(4))  # indented text would become code
        return found[:-1] + "\\" + found[-1]

    return _ACTIVE.sub(inert, question)


def answer_markdown(answer: str) -> str:
    """Return an answer as Markdown without HTML and pictures: a model may write them, and a page must not load them."""
    parts = _CODE.split(answer)
    for number in range(0, len(parts), 2):  # the others are code, which is shown as it is
        parts[number] = re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", parts[number]).replace("![", "!\\[")
    return "".join(parts)


def chat_messages(conversation: Sequence[Asked], language: str) -> list[dict[str, Any]]:
    """Return the messages of a conversation: pictures, question, answer."""
    messages: list[dict[str, Any]] = []
    number = 0
    for asked in conversation:
        if asked.pictures:
            images = ""
            for picture in asked.pictures:
                number += 1
                name = html.escape(f"{say(language, 'picture')} {number}")
                images += f'<img class="picture" src="{picture.thumbnail}" alt="{name}" title="{name}">'
            value = f'<div class="pictures">{images}</div>'
            content = {"type": "component", "component": "html", "value": value, "props": {}, "constructor_args": {}}
            messages.append({"role": "user", "content": content})
        messages.append({"role": "user", "content": escape(asked.text)})
        if asked.answer:
            messages.append({"role": "assistant", "content": answer_markdown(asked.answer)})
    return messages


def question_at(conversation: Sequence[Asked], index: object) -> int | None:
    """Return which question of a conversation a message of `chat_messages` is, or None if it is something else."""
    at = 0
    for number, asked in enumerate(conversation):
        at += bool(asked.pictures)
        if at == index:
            return number
        at += 1 + bool(asked.answer)
    return None
