"""Samples that benchmarks make up: answers of real words, each a token of Qwen's, and the two files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwen import QWenTokenizer

from .vocabulary import vocabulary_file

ANSWER_TOKENS = (15, 90)
"""Tokens of an answer, its end included: the fewest and the most."""
QUESTION = "<|extra_0|>What does this picture show?"


class Answers:
    """Draws answers.

    Args:
        generator: draws lengths and words.
        tokens: of an answer, its end included: the fewest and the most.
    """

    def __init__(self, generator: np.random.Generator, tokens: tuple[int, int] = ANSWER_TOKENS) -> None:
        self.generator = generator
        self.tokens = tokens
        tokenizer = QWenTokenizer(str(vocabulary_file()))
        texts = (tokenizer.decode([index]) for index in range(1000, 20_000))
        self.words = [text for text in texts if text[:1] == " " and text[1:].isascii() and text[1:].isalpha()]

    def draw(self) -> str:
        """One answer."""
        length = int(self.generator.integers(self.tokens[0], self.tokens[1] + 1)) - 1  # and the end
        return "".join(self.generator.choice(self.words, length)).strip()


def write_files(folder: Path, pictures: Path, names: Sequence[str], answers: Sequence[str], question: str) -> None:
    """Write `image_map.json` and `captions.json` of samples with one picture each.

    Args:
        folder: where they go.
        pictures: the folder of the pictures.
        names: of the pictures.
        answers: as many.
        question: the same for all.
    """
    image_map, captions = {}, {}
    for index, (name, answer) in enumerate(zip(names, answers, strict=True)):
        image_map[str(index)] = {"image_file": name, "ID": index, "path": str(pictures)}
        captions[str(index)] = {"q": question, "a": answer}
    for file, content in (("image_map", image_map), ("captions", captions)):
        (folder / f"{file}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
