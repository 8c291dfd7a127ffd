"""Text to pretrain the language model on: the training questions about scenes that are told in words, not shown.

No image is involved. A description takes the place that the image will have later, so that the model learns to answer
from it; what is left for the vision-language stage is to make image features read like words.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from dataprocess.ai_challenger import PROMPTS
from dataprocess.records import PLACEHOLDER

from .questions import Question
from .shapes import Scene

Turn = tuple[str, str]


def describe(scene: Scene, rng: random.Random) -> str:
    """Tell a scene in words: by its caption, or by its two words in any order."""
    words = [scene.color, scene.shape]
    rng.shuffle(words)
    return rng.choice((scene.caption, " ".join(words)))


def conversation(scene: Scene, questions: Sequence[Question], rng: random.Random) -> list[Turn]:
    """Return questions about one scene and their answers; its description comes before the first question."""
    turns = [(question.text, question.answer) for question in questions]
    turns[0] = (f"{describe(scene, rng)}\n{turns[0][0]}", turns[0][1])
    return turns


def captioning(scene: Scene, rng: random.Random) -> list[Turn]:
    """Return a Chinese question of the data set, its image replaced by the description, and a Chinese caption."""
    question = rng.choice(PROMPTS).replace(PLACEHOLDER, describe(scene, rng))
    return [(question, rng.choice(scene.chinese_captions))]


def split_into_conversations(questions: Sequence[Question], num_turns: int) -> list[list[Question]]:
    """Cut a picture's questions into conversations of at most `num_turns` turns, in their order."""
    return [list(questions[start : start + num_turns]) for start in range(0, len(questions), num_turns)]
