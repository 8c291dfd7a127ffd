"""Tiny base models on disk, vision-language models over them, and batches, for the tests of `model/`."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_qwen import random_ids, tiny_model
from torch import Tensor, nn
from transformers import GenerationConfig

from dataset import VLMCollator
from model import LoraSettings, VisionLanguageModel
from qwen import IGNORE_INDEX, IMAGE_TOKEN_ID

VOCAB_SIZE = IMAGE_TOKEN_ID + 2
PAD_ID = 151643
NUM_IMAGE_TOKENS = 4
"""What the tiny towers give for an image."""
RANK, ALPHA = 4, 8


def make_language_model(folder: Path, seed: int = 0, **changes) -> str:
    """A tiny QWen in the published format, its embedding large enough for the image token."""
    model = tiny_model(seed=seed, vocab_size=VOCAB_SIZE, **changes)
    model.generation_config = GenerationConfig(eos_token_id=PAD_ID, pad_token_id=PAD_ID)
    model.save_pretrained(str(folder))
    return str(folder)


def new_model(bases: tuple[str, str], *, dropout: float = 0.0, seed: int = 0, dtype=torch.float32, layers: int = 2):
    """A model that is ready for training, on the CPU, with fresh LoRA layers and projector drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionLanguageModel.from_pretrained(
            *bases, dtype=dtype, device="cpu", trainable=True, projector_layers=layers
        )
        model.add_lora(LoraSettings(rank=RANK, alpha=ALPHA, dropout=dropout))
    return model


def enliven_trained(model: VisionLanguageModel, seed: int = 0, std: float = 0.2) -> VisionLanguageModel:
    """Give LoRA and projector weights as training might leave them: none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.normal_(0, std, generator=generator)
    return model


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def sample(num_images: int, num_words: int = 5, num_answer: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Words, then images with a word before and after each, and an answer; as the data set gives samples."""
    words = random_ids(num_words + num_answer + num_images, seed=seed + 100).tolist()
    ids = words[:num_words]
    for word in words[num_words : num_words + num_images]:
        ids += [IMAGE_TOKEN_ID] * NUM_IMAGE_TOKENS + [word]
    answer = words[num_words + num_images :]
    made = {
        "input_ids": torch.tensor(ids + answer),
        "labels": torch.tensor([IGNORE_INDEX] * len(ids) + answer),
    }
    if num_images:
        generator = torch.Generator().manual_seed(seed)
        made["pixel_values"] = torch.randn(num_images, 3, 28, 28, generator=generator)
    return made


def collate(*samples: dict[str, Tensor]) -> dict[str, Tensor]:
    return VLMCollator(PAD_ID)(samples)


def prompt_of(sample: dict[str, Tensor]) -> Tensor:
    """The tokens before the answer."""
    return sample["input_ids"][sample["labels"] == IGNORE_INDEX]


def logits_of(model: VisionLanguageModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits
