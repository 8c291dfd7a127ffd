"""A visitor's conversation, and what the model reads of it.

Shape legend: N pictures of the conversation, P tokens per picture, D the language model's width, H the tower's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dataset.prompt import encode_prompt
from qwen import IMAGE_TOKEN
from qwen.answering import DEFAULT_MAX_NEW_TOKENS, merge_settings
from qwen.chatml import Turn
from qwen.prompt_cache import PromptCache

from ..asking.assistant import Assistant
from ..asking.prompt_window import fit_prompt
from .limits import SAMPLING, Limits
from .words import Refusal

TYPED_PLACEHOLDER = "<|\ue000extra_0|>"
"""What a typed `<|extra_0|>` is called until it is tokenized, when it becomes those characters, and no image."""


@dataclass(eq=False)
class Picture:
    """A picture of a question; its file is gone."""

    thumbnail: str
    """A `data:` URI for the page."""
    pixels: Tensor
    """(3, H, H), what the tower takes."""
    features: Tensor | None = None
    """(P, D) on the CPU, once the tower has seen it."""


@dataclass(eq=False)
class Asked:
    """A question, and its answer so far; an empty one means that there is none."""

    text: str
    pictures: list[Picture]
    answer: str = ""

    @property
    def prompt(self) -> str:
        """Return the question with a placeholder for each picture in front. A typed one is text."""
        return IMAGE_TOKEN * len(self.pictures) + self.text.replace(IMAGE_TOKEN, TYPED_PLACEHOLDER)


class TypedText:
    """A tokenizer for which `TYPED_PLACEHOLDER` is the text `<|extra_0|>`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text without any special token."""
        ids: list[int] = self._tokenizer.encode_text(text.replace(TYPED_PLACEHOLDER, IMAGE_TOKEN))
        return ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def as_turns(conversation: Sequence[Asked]) -> tuple[str, list[Turn]]:
    """Return the last question, and the turns before it.

    A question without an answer (it was stopped early) counts as not asked; its pictures move to the next question.
    """
    turns: list[Turn] = []
    pictures = ""
    for asked in conversation[:-1]:
        if asked.answer:
            turns.append((pictures + asked.prompt, asked.answer))
            pictures = ""
        else:
            pictures += IMAGE_TOKEN * len(asked.pictures)
    return pictures + conversation[-1].prompt, turns


def build_prompt(assistant: Assistant, conversation: Sequence[Asked]) -> tuple[list[int], bool]:
    """Return the prompt's token ids, and whether the oldest questions were left out of it.

    Raises:
        Refusal: if the last question does not fit into the window together with all pictures.
    """
    query, turns = as_turns(conversation)
    tokenizer: Any = TypedText(assistant.tokenizer)
    window, length = assistant.max_window_size, assistant.model.num_image_tokens
    ids, num_dropped = encode_prompt(tokenizer, query, length, turns, assistant.system, window)
    if num_dropped == 0 and len(ids) <= window:
        return ids, False
    pictures = IMAGE_TOKEN * sum(question.count(IMAGE_TOKEN) for question, _ in turns)
    alone, _ = encode_prompt(tokenizer, pictures + query, length, (), assistant.system, window)
    if len(alone) > window:
        raise Refusal("no_room", most=window)
    return fit_prompt(tokenizer, query, length, turns, assistant.system, window), True


def stream_answer(
    assistant: Assistant, conversation: Sequence[Asked], prompt: list[int], options: dict[str, Any], cache: PromptCache
) -> Iterator[str]:
    """Yield the growing answer to a conversation's last question."""
    pictures = [picture for asked in conversation for picture in asked.pictures]
    new = [picture for picture in pictures if picture.features is None]
    encoded = assistant.encode([picture.pixels for picture in new])  # (new ones of N, P, D)
    for number, picture in enumerate(new):
        assert encoded is not None
        picture.features = encoded[number].cpu()
    device = assistant.model.qwen.device
    features = torch.stack([p.features for p in pictures if p.features is not None]).to(device) if pictures else None
    yield from assistant.stream_row(prompt, features, cache, options)


def longest_answer(assistant: Assistant) -> int:
    """Return the most tokens of an answer: the flag's, else the model's own, else the default."""
    config, _ = merge_settings(assistant.model.qwen, None, dict(assistant.options))
    return int(config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS)


def page_settings(assistant: Assistant, limits: Limits) -> dict[str, Any]:
    """Return the settings that the page begins with: the flags', else the model's own, within the page's ranges."""
    config, _ = merge_settings(assistant.model.qwen, None, dict(assistant.options))
    values: dict[str, Any] = {"do_sample": bool(config.do_sample)}
    for name, (least, most) in SAMPLING.items():
        value = getattr(config, name)
        neutral = 0 if name == "top_k" else 1.0
        values[name] = min(max(neutral if value is None else value, least), most)
    return {**values, "max_new_tokens": limits.max_new_tokens}


def check_settings(values: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Return what a page sends as generation settings.

    Raises:
        Refusal: if one is no number or out of its range: only a program can send that.
    """
    ranges: dict[str, tuple[float, float]] = {**SAMPLING, "max_new_tokens": (1, limits.max_new_tokens)}
    options: dict[str, Any] = {"do_sample": values.get("do_sample") is True}
    for name, (least, most) in ranges.items():
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise Refusal("bad_setting", name=name, least=least, most=most)
        options[name] = int(value) if name in ("top_k", "max_new_tokens") else float(value)
    if not options["do_sample"]:
        options = {name: value for name, value in options.items() if name not in ("temperature", "top_p", "top_k")}
    return options
