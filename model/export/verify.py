"""Ask an export and our own model the same questions, and compare: prompts, pixels, logits, answers.

Both compute in fp32 on the CPU with the weights as they were exported, one model after the other, so that what differs
is the order of additions and nothing else. That takes 4 bytes a parameter, or, block by block, those of one block.
"""

from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from dataset.prompt import Tokenizer, encode_prompt
from qwen import IMAGE_TOKEN
from visual.base import VisionTower

from ..checkpoints.base_models import load_language_model, load_tokenizer
from ..checkpoints.checkpoint import load_projector
from ..lora import merge_lora
from ..projector import build_projector
from ..scaling.by_block import compute_by_block
from ..vision_language_model import VisionLanguageModel
from .sources import Sources

QUESTIONS = ("这幅图像描述了什么？", "Which colours are there?", "你好！请介绍一下你自己。")
GREEDY: dict[str, Any] = {
    **{"max_new_tokens": 12, "do_sample": False},
    **{"temperature": None, "top_p": None, "top_k": None, "repetition_penalty": None},
}
"""How answers are generated, whatever the model's own settings; the tokenizer says at which tokens they end."""
TOLERANCE = 1e-3
"""The largest difference of logits, as a share of the largest logit."""

Prepare = Callable[[str, Image.Image | None], dict[str, Tensor]]
"""(question, picture) -> the model's inputs: `input_ids` (1, T), `attention_mask`, and maybe `pixel_values`."""


class ExportMismatchError(RuntimeError):
    """An export that does not compute what our own model does."""


@dataclass(frozen=True)
class Answer:
    """What a model was given, and what it gave."""

    question: str
    has_image: bool
    inputs: dict[str, Tensor]
    tokens: list[int]
    logits: Tensor  # (tokens + 1, V), from the last token of the prompt on


@dataclass(frozen=True)
class Comparison:
    """One question, asked of both, whose answers were as they should be."""

    question: str
    has_image: bool
    num_prompt_tokens: int
    num_equal: int  # greedy tokens that were the same
    num_tokens: int  # of the answer
    difference: float  # largest difference of logits
    largest_logit: float


def verify(sources: Sources, folder: Path, kind: str, by_block: bool = False) -> list[Comparison]:
    """Ask both models, and compare.

    Args:
        sources: what was exported.
        folder: the export.
        kind: its format.
        by_block: bring one block of a language model at a time to fp32; slower.

    Returns:
        One entry per question, with a picture and without one.

    Raises:
        ExportMismatchError: if inputs, answers or logits differ.
    """
    tokenizer = load_tokenizer(sources.language_name)
    ours = _our_model(sources, by_block)
    prepare = _our_inputs(ours, tokenizer)
    asked = [None] if kind == "peft" else [sample_picture(sources.tower.image_size), None]
    settings = _settings(tokenizer)
    if kind == "llava":
        image_token_id = json.loads((folder / "config.json").read_text(encoding="utf-8"))["image_token_index"]
        settings["suppress_tokens"] = [image_token_id]  # in an answer, it would stand for a picture that is not there
    expected = list(_ask(ours, prepare, asked, settings))
    if kind == "llava":
        del ours, prepare
        gc.collect()  # only one of them in memory
        theirs, prepare = _stranger(folder, by_block)
        expected = [_with_image_token(one, tokenizer.image_token_id, image_token_id) for one in expected]
    elif kind == "merged":
        theirs = _merged_model(sources, folder, ours.vision_tower, by_block)
    else:
        theirs = _peft_model(sources, folder, by_block)
    found = _ask(theirs, prepare, asked, settings)
    return [_compare(one, other) for one, other in zip(expected, found, strict=True)]


def our_answers(sources: Sources, pictures: list[Any], forbidden: list[int], by_block: bool) -> list[Answer]:
    """Ask our own model about each picture (None asks without one), and let it answer without some tokens."""
    model, tokenizer = _our_model(sources, by_block), load_tokenizer(sources.language_name)
    settings = _settings(tokenizer) | {"suppress_tokens": forbidden or None}
    return list(_ask(model, _our_inputs(model, tokenizer), pictures, settings))


def _settings(tokenizer: Tokenizer) -> dict[str, Any]:
    return {**GREEDY, "eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_token_id}


def sample_picture(size: int) -> Image.Image:
    """Draw a picture of the tower's size: colours that change from place to place, and three shapes."""
    ramp = Image.linear_gradient("L").resize((size, size))  # (size, size)
    image = Image.merge("RGB", (ramp, ramp.transpose(Image.Transpose.ROTATE_90), ramp.point(lambda v: 255 - v)))
    draw = ImageDraw.Draw(image)
    draw.ellipse((size // 8, size // 8, size // 2, size // 2), fill=(220, 20, 20))
    draw.rectangle((size // 2, size // 3, size * 7 // 8, size * 2 // 3), fill=(20, 40, 220))
    draw.line((0, size, size, 0), fill=(250, 250, 250), width=max(1, size // 28))
    return image


# ---- The models


def _our_model(sources: Sources, by_block: bool) -> VisionLanguageModel:
    model = VisionLanguageModel.from_pretrained(
        sources.language_name, sources.vision_name, sources.checkpoint.folder, sources.dtype, "cpu"
    )
    if by_block:
        compute_by_block(model.qwen)
    else:
        model.merge_lora()
    model.projector.to(sources.dtype)  # rounded as in the export
    return model.float().eval()


def _our_inputs(model: VisionLanguageModel, tokenizer: Tokenizer) -> Prepare:
    transform, num_image_tokens = model.vision_tower.image_transform, model.num_image_tokens
    system = tokenizer.default_system

    def prepare(question: str, image: Image.Image | None) -> dict[str, Tensor]:
        text = question if image is None else IMAGE_TOKEN + question
        ids = torch.tensor([encode_prompt(tokenizer, text, num_image_tokens, system=system)[0]])  # (1, T)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return inputs if image is None else {**inputs, "pixel_values": transform(image)[None]}

    return prepare


def _stranger(folder: Path, by_block: bool) -> tuple[Any, Prepare]:
    """Load the export with transformers alone."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto" if by_block else torch.float32).eval()
    if by_block:
        compute_by_block(model.get_decoder())
        model.float()
    processor: Any = AutoProcessor.from_pretrained(folder, backend="pil")

    def prepare(question: str, image: Image.Image | None) -> dict[str, Tensor]:
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if image is not None:
            content.insert(0, {"type": "image", "image": image})
        messages = [{"role": "user", "content": content}]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return dict(inputs)

    return model, prepare


def _merged_model(sources: Sources, folder: Path, tower: VisionTower, by_block: bool) -> VisionLanguageModel:
    """Put a folder of `--format merged` together, as docs/serving.md does."""
    language: Any = load_language_model(str(folder), sources.dtype)
    if by_block:
        compute_by_block(language)
    layers, factor = sources.checkpoint.projector_layers, sources.checkpoint.pixel_shuffle
    projector = build_projector(tower.hidden_size * factor**2, language.config.hidden_size, layers)
    load_projector(projector, folder)
    projector.to(sources.dtype)
    return VisionLanguageModel(tower, projector, language, str(folder), {}, factor).float().eval()


def _peft_model(sources: Sources, folder: Path, by_block: bool) -> Any:
    """Load the base model and, with PEFT alone, the export; without a tower it can be asked about no picture."""
    from peft import PeftModel

    base: Any = load_language_model(sources.language_name, sources.dtype)
    model: Any = PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=True)
    if by_block:
        compute_by_block(base)
        return base.float().eval()
    return merge_lora(model).float().eval()


# ---- Asking and comparing


@torch.no_grad()
def _ask(model: Any, prepare: Prepare, pictures: list[Any], settings: dict[str, Any]) -> Iterator[Answer]:
    for question in QUESTIONS:
        for image in pictures:
            inputs = prepare(question, image)
            length = inputs["input_ids"].shape[1]
            ids = model.generate(**inputs, **settings)  # (1, T + tokens)
            whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            logits = model(**whole).logits[0, length - 1 :]  # (tokens + 1, V)
            yield Answer(question, image is not None, inputs, ids[0, length:].tolist(), logits.clone())


def _with_image_token(answer: Answer, ours: int, theirs: int) -> Answer:
    ids = answer.inputs["input_ids"]  # (1, T)
    return replace(answer, inputs={**answer.inputs, "input_ids": ids.masked_fill(ids == ours, theirs)})


def _compare(ours: Answer, theirs: Answer) -> Comparison:
    where = f"{ours.question!r} {'with' if ours.has_image else 'without'} a picture"
    for name, value in ours.inputs.items():
        other = theirs.inputs.get(name)
        if other is None or other.shape != value.shape or not torch.allclose(other.to(value.dtype), value, atol=1e-5):
            raise ExportMismatchError(f"{where}: the export is given another {name} than our own model")
    pairs = zip(ours.tokens, theirs.tokens, strict=False)
    num_equal = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    seen = slice(num_equal + 1)  # positions that have seen the same tokens
    shared = theirs.logits[:, : ours.logits.shape[1]]  # (tokens + 1, V): without the row of a new image token
    difference = float((ours.logits[seen] - shared[seen]).abs().max())
    largest = float(ours.logits.abs().max())
    if ours.tokens != theirs.tokens or not difference <= TOLERANCE * largest:
        raise ExportMismatchError(
            f"{where}: {num_equal} of {len(ours.tokens)} greedy tokens are equal, and logits differ by up to "
            f"{difference:.2g} (the largest is {largest:.3g}); expected all tokens, and at most {TOLERANCE:g} of it"
        )
    length = ours.inputs["input_ids"].shape[1]
    return Comparison(ours.question, ours.has_image, length, num_equal, len(ours.tokens), difference, largest)
