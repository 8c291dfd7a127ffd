"""What both peers of `train_step.py` train: pictures and captions, and one model in our format and in transformers'.

    python -m benchmarks.training.step_inputs --folder FOLDER --size vocabulary-true

*Vocabulary-true* has Qwen's vocabulary over a trunk of 8 × 512, so that the language head is three quarters of the
matrices that multiply. *Proportional* has the same trunk and a head of 4,748 rows: in Qwen-7B, head to trunk is as
151,936 rows to 32 layers of width 4096, and rows = 151,936 · (8 · 512) / (32 · 4096) keeps that share (8.8%). Token ids
stay Qwen's; `small_vocabulary.py` maps them onto the rows that there are.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from model import VisionLanguageModel

from ..peers import SEED, Size, build_ours, build_peer, copy_weights, save_tower
from ..synthetic_data import ANSWER_TOKENS, QUESTION, Answers, write_files
from ..vocabulary import vocabulary_file

SIZES = {"vocabulary-true": Size(), "proportional": Size(vocabulary=4748)}
PICTURE = (640, 480)
"""Pixels of a picture, as COCO's are."""


def write_data(folder: Path, number: int, answer_tokens: tuple[int, int] = ANSWER_TOKENS) -> None:
    """Write pictures, image map and captions, the answers of so many tokens (fewest, most)."""
    generator = np.random.default_rng(SEED)
    drawn, answers = Answers(generator, answer_tokens), []
    (folder / "pictures").mkdir(parents=True)
    for index in range(number):
        coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(PICTURE, Image.Resampling.BICUBIC).save(folder / f"pictures/{index}.jpg")
        answers.append(drawn.draw())
    names = [f"{index}.jpg" for index in range(number)]
    write_files(folder, folder / "pictures", names, answers, QUESTION)


def write_ours(folder: Path, size: Size) -> VisionLanguageModel:
    """Write random weights as QWen, CLIP and projector; returns the model that they are of."""
    ours = build_ours(size, torch.float32)
    ours.qwen.save_pretrained(str(folder / "qwen"))
    shutil.copy(vocabulary_file(), folder / "qwen")
    save_tower(size, folder / "clip")
    save_file(ours.projector.state_dict(), folder / "projector.safetensors")
    return ours


def write_models(folder: Path, size: Size) -> None:
    """Write one set of random weights as QWen, CLIP and projector, and as LLaVA."""
    ours, peer = write_ours(folder, size), build_peer(size, torch.float32)
    copy_weights(ours, peer)
    peer.save_pretrained(str(folder / "llava"))


def main() -> None:
    """Write everything into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--samples", type=int, default=128)
    given = parser.parse_args()
    write_data(given.folder, given.samples)
    write_models(given.folder, SIZES[given.size])


if __name__ == "__main__":
    main()
