"""What both peers of `train_step.py` train: pictures and captions, and one model in our format and in transformers'.

    python -m benchmarks.step_inputs --folder FOLDER --size vocabulary-true

*Vocabulary-true* has Qwen's vocabulary over a trunk of 8 × 512, so that the language head is three quarters of the
matrices that multiply. *Proportional* has the same trunk and a head of 4,748 rows: in Qwen-7B, head to trunk is as
151,936 rows to 32 layers of width 4096, and rows = 151,936 · (8 · 512) / (32 · 4096) keeps that share (8.8%). Token ids
stay Qwen's; `fold` maps them onto the rows that there are.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.vocabulary import vocabulary_file
from model import VisionLanguageModel
from qwen import IGNORE_INDEX, QWenTokenizer

from .same_size import SEED, Size, build_ours, build_peer, copy_weights, save_tower

SIZES = {"vocabulary-true": Size(), "proportional": replace(Size(), vocabulary=4748)}
ANSWER_TOKENS = (15, 90)
"""Tokens of an answer, both ends included."""
PICTURE = (640, 480)
"""Pixels of a picture, as COCO's are."""
QUESTION = "<|extra_0|>What does this picture show?"


class FoldedEmbedding(nn.Embedding):
    """An embedding of fewer rows than there are token ids."""

    def forward(self, input: Tensor) -> Tensor:
        """Embed ids of any size."""
        return super().forward(input % self.num_embeddings)


def fold(module: nn.Embedding) -> FoldedEmbedding:
    """The same embedding, for ids of any size."""
    folded = FoldedEmbedding(*module.weight.shape, _weight=module.weight)
    folded.weight.requires_grad_(module.weight.requires_grad)
    return folded


def fold_labels(batch: dict[str, Any], rows: int) -> dict[str, Any]:
    """Map a batch's labels onto the rows of a head."""
    labels = batch["labels"]
    return {**batch, "labels": torch.where(labels == IGNORE_INDEX, labels, labels % rows)}


def write_data(folder: Path, number: int, answer_tokens: tuple[int, int] = ANSWER_TOKENS) -> None:
    """Write pictures, image map and captions, the answers of so many tokens (fewest, most)."""
    generator = np.random.default_rng(SEED)
    tokenizer = QWenTokenizer(str(vocabulary_file()))
    texts = (tokenizer.decode([index]) for index in range(1000, 20_000))
    words = [text for text in texts if text[:1] == " " and text[1:].isascii() and text[1:].isalpha()]
    (folder / "pictures").mkdir(parents=True)
    image_map, captions = {}, {}
    for index in range(number):
        coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(PICTURE, Image.Resampling.BICUBIC).save(folder / f"pictures/{index}.jpg")
        length = int(generator.integers(answer_tokens[0], answer_tokens[1] + 1)) - 1  # and the end
        answer = "".join(generator.choice(words, length)).strip()
        image_map[str(index)] = {"image_file": f"{index}.jpg", "ID": index, "path": str(folder / "pictures")}
        captions[str(index)] = {"q": QUESTION, "a": answer}
    for name, content in (("image_map", image_map), ("captions", captions)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


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
