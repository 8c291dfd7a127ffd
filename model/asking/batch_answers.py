"""Many questions through an assistant, in batches, and their answers in the order of the questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .assistant import Assistant

_WINDOW = 4
"""Batches that are sorted by the length of their prompts together, so that little of a batch is padding."""


@dataclass(frozen=True)
class Asked:
    """A question as it goes to the model."""

    prompt: str
    """With a placeholder for every image."""
    images: tuple[Path, ...]
    """Its pictures, in the order of the placeholders."""
    name: str = ""
    """What it is called in the log."""


@dataclass(frozen=True)
class Outcome:
    """What became of a question: an answer, or why there is none."""

    answer: str | None
    """The answer's text."""
    error: str | None = None
    """Why there is none, in one line."""


def answer_all(
    assistant: Assistant,
    questions: Sequence[Asked | ValueError],
    open_image: Callable[[Path], Image.Image],
    batch_size: int,
    seed: int,
) -> Iterator[Outcome]:
    """Answer questions.

    Args:
        assistant: who answers.
        questions: each, or what is wrong with it.
        open_image: reads a picture; raises ValueError where it can't.
        batch_size: questions that are answered together.
        seed: of sampling; every answer is the one that this seed gives to its question alone.

    Yields:
        Outcomes in the order of the questions, each as soon as it and all before it are there.

    Raises:
        ValueError: before the first, for settings under which no question can be answered.
    """
    assistant.check_settings()
    for start in range(0, len(questions), batch_size * _WINDOW):
        window = questions[start : start + batch_size * _WINDOW]
        outcomes: dict[int, Outcome] = {}
        prompts: dict[int, list[int]] = {}
        for place, question in enumerate(window):
            try:
                if isinstance(question, ValueError):
                    raise question
                prompts[place] = assistant.prompt_ids(question.prompt, name=question.name)
            except ValueError as error:
                outcomes[place] = _failed(error)
        order = sorted(prompts, key=lambda place: len(prompts[place]))
        num_given = 0
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            asked: dict[int, Any] = {place: window[place] for place in places}
            outcomes |= _answer_batch(assistant, asked, prompts, open_image, seed)
            while num_given in outcomes:
                yield outcomes[num_given]
                num_given += 1
        yield from (outcomes[place] for place in range(num_given, len(window)))


def _answer_batch(
    assistant: Assistant,
    asked: dict[int, Asked],
    prompts: dict[int, list[int]],
    open_image: Callable[[Path], Image.Image],
    seed: int,
) -> dict[int, Outcome]:
    """Answer the questions of one batch, given and returned by their place in the window."""
    pictures: dict[Path, Image.Image] = {}
    outcomes: dict[int, Outcome] = {}
    for place, question in asked.items():
        try:
            for path in question.images:
                if path not in pictures:
                    pictures[path] = open_image(path)
        except ValueError as error:
            outcomes[place] = _failed(error)
    live = [place for place in asked if place not in outcomes]
    needed = list(dict.fromkeys(path for place in live for path in asked[place].images))
    try:
        found = assistant.features([pictures[path] for path in needed])  # the tower sees every picture once
        by_path: dict[Path, Tensor] = {} if found is None else dict(zip(needed, found, strict=True))
        rows = [[by_path[path] for path in asked[place].images] for place in live]
        features = [torch.stack(row) if row else None for row in rows]
        answers = assistant.answer_rows([prompts[place] for place in live], features, seed)
        return outcomes | {place: Outcome(answer) for place, answer in zip(live, answers, strict=True)}
    except ValueError as error:
        if len(live) == 1:
            return outcomes | {live[0]: _failed(error)}
    for place in live:  # one of them can't be answered; which one shows when each is asked alone
        outcomes |= _answer_batch(assistant, {place: asked[place]}, prompts, open_image, seed)
    return outcomes


def _failed(error: ValueError) -> Outcome:
    return Outcome(None, " ".join(str(error).split()))
