"""What benchmarks train on: pictures, answers of real words, the two files of a data set, and train.py's flags."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .vocabulary import vocabulary_file

SEED = 42
ANSWER_TOKENS = (15, 90)
"""Tokens of an answer, its end included: the fewest and the most."""
QUESTION = "<|extra_0|>What does this picture show?"
PICTURE = (640, 480)
"""Pixels of a picture, as COCO's are."""


def draw_answers(number: int, tokens: tuple[int, int] = ANSWER_TOKENS) -> list[str]:
    """Return so many answers of random English words, each of them one token of Qwen's."""
    from qwen import QWenTokenizer  # not before: a process that starts others must stay small

    generator = np.random.default_rng(SEED)
    tokenizer = QWenTokenizer(str(vocabulary_file()))
    texts = (tokenizer.decode([index]) for index in range(1000, 20_000))
    words = [text for text in texts if text[:1] == " " and text[1:].isascii() and text[1:].isalpha()]
    lengths = generator.integers(tokens[0], tokens[1] + 1, number) - 1  # without the end
    return ["".join(generator.choice(words, length)).strip() for length in lengths]


def write_samples(
    folder: Path,
    number: int,
    answer_tokens: tuple[int, int] = ANSWER_TOKENS,
    *,
    detail: tuple[int, int] = (12, 16),
    grain: float = 0,
) -> None:
    """Write pictures, `image_map.json` and `captions.json`; a sample has one picture.

    Args:
        folder: where they go.
        number: of samples.
        answer_tokens: of an answer: the fewest and the most.
        detail: rows and columns of random colours that a picture is enlarged from.
        grain: standard deviation of the noise on top, of 255; with 12 files are as large as those of photographs.
    """
    generator = np.random.default_rng(SEED)
    (folder / "pictures").mkdir(parents=True)
    image_map, captions = {}, {}
    for index, answer in enumerate(draw_answers(number, answer_tokens)):
        colours = generator.integers(0, 256, (*detail, 3), dtype=np.uint8)
        picture = Image.fromarray(colours).resize(PICTURE, Image.Resampling.BICUBIC)
        if grain:
            noisy = np.asarray(picture, dtype=np.float32) + generator.normal(0, grain, (*PICTURE[::-1], 3))
            picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        picture.save(folder / "pictures" / f"{index}.jpg", quality=90)
        image_map[str(index)] = {"image_file": f"{index}.jpg", "ID": index, "path": str(folder / "pictures")}
        captions[str(index)] = {"q": QUESTION, "a": answer}
    for name, content in (("image_map", image_map), ("captions", captions)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def build_trainer(flags: list[str]) -> Any:
    """Return what train.py trains for a command line; nothing keeps other runs out of its folder afterwards."""
    import train
    from model.arguments import parse_arguments

    with contextlib.ExitStack() as lock:
        return train.build_trainer(*parse_arguments(flags), lock)


def train_flags(folder: Path, output: Path | str, **changes: Any) -> list[str]:
    """Return the flags of a `train.py` over a folder's models and samples, on the CPU, that saves nothing."""
    values = {
        "base_language_model": folder / "qwen",
        "base_value_model": folder / "clip",
        "image_map": folder / "image_map.json",
        "captions_file": folder / "captions.json",
        "output_dir": output,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": "true",
        "use_cpu": "true",
        "seed": SEED,
        **changes,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]
