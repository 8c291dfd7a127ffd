"""easy-vqa's questions and pictures, read from the installed package (https://github.com/vzhou842/easy-VQA, MIT)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .shapes import COLORS, SHAPES, Scene

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Question:
    """A question about a picture, with its answer."""

    text: str
    """In English, lower case."""
    answer: str
    """One word: yes, no, a colour or a shape."""
    image_id: int
    """The picture's number within its split."""

    @property
    def is_negated(self) -> bool:
        """Tell whether it asks what is *not* there."""
        return not {"no", "not"}.isdisjoint(self.text.split())

    @property
    def kind(self) -> str:
        """Return the kind of question: "what color", "what shape", or one of four kinds of yes/no questions."""
        if self.text.startswith("what"):
            return "what color" if "color" in self.text else "what shape"
        subject = "color" if any(color in self.words for color in COLORS) else "shape"
        return f"no {subject}?" if self.is_negated else f"a {subject}?"

    @property
    def words(self) -> list[str]:
        """Return the words without the question mark."""
        return self.text.rstrip("?").split()


KINDS = ("what color", "what shape", "a color?", "a shape?", "no color?", "no shape?")
"""Values of `Question.kind`: "a shape?" is "is there a circle?", "no color?" is "is no red shape present?"."""


def data_folder() -> Path:
    """Return the data folder of the installed package.

    Raises:
        FileNotFoundError: if it is not installed.
    """
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package easy-vqa is not installed: pip install --no-deps easy-vqa==1.0")
    return Path(spec.origin).parent / "data"


def image_folder(split: str) -> Path:
    """Return the folder with the pictures `0.png`, `1.png`, … of a split."""
    return data_folder() / split / "images"


def image_path(split: str, image_id: int) -> Path:
    """Return the file of a picture."""
    return image_folder(split) / f"{image_id}.png"


def load_questions(split: str) -> list[Question]:
    """Return all questions of a split ("train" or "test"), in the file's order."""
    records = json.loads((data_folder() / split / "questions.json").read_text(encoding="utf-8"))
    return [Question(*record) for record in records]


def questions_by_image(questions: Sequence[Question]) -> dict[int, list[Question]]:
    """Group questions by picture, in their order."""
    groups: dict[int, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.image_id, []).append(question)
    return groups


def scenes_told(questions: Sequence[Question]) -> dict[int, Scene]:
    """Return what pictures show by their questions and answers; pictures whose colour or shape stays open are left out.

    Args:
        questions: of the training split: of test pictures nothing must be known before they are asked about.
    """
    scenes = {}
    for image_id, group in questions_by_image(questions).items():
        told: set[str] = set()
        for question in group:
            if question.answer not in ("yes", "no"):
                told.add(question.answer)
                told.update(question.words)  # "what is the blue shape?"
            elif (question.answer == "yes") != question.is_negated:
                told.update(question.words)
        colors, shapes = told & set(COLORS), told & set(SHAPES)
        if len(colors) == len(shapes) == 1:
            scenes[image_id] = Scene(shapes.pop(), colors.pop())
    return scenes
