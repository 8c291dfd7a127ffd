"""Questions with other questions' pictures: what a model still gets right, it did not see."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..asking.question_file import Question


def blind_questions(questions: Sequence[Question]) -> list[Question]:
    """Return the questions, each with the pictures of another one.

    The pictures of all questions with as many pictures, in their order and each set of them once, are shifted by half
    their number. A question keeps what it has if it has no picture, or if all with as many have the same.

    Raises:
        ValueError: if all questions keep what they have.
    """
    distinct: dict[int, dict[frozenset[Path], tuple[Path, ...]]] = {}
    for question in questions:
        distinct.setdefault(len(question.images), {}).setdefault(frozenset(question.images), question.images)
    shown = {number: list(sets.values()) for number, sets in distinct.items()}
    places = {number: {one: at for at, one in enumerate(sets)} for number, sets in distinct.items()}
    if all(len(pictures) == 1 for pictures in shown.values()):
        raise ValueError("--blind: no question can get another question's pictures; leave the flag out")
    swapped = []
    for question in questions:
        pictures = shown[len(question.images)]
        if len(pictures) > 1:
            at = places[len(question.images)][frozenset(question.images)] + len(pictures) // 2
            question = dataclasses.replace(question, images=pictures[at % len(pictures)])
        swapped.append(question)
    return swapped


def number_kept(questions: Sequence[Question]) -> int:
    """Return how many questions keep what they have."""
    pairs = zip(questions, blind_questions(questions), strict=True)
    return sum(before.images == after.images for before, after in pairs)
