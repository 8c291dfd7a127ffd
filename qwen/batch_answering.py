"""Answers to many prompts: each is the one that its prompt would get alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .answering import answer_ids, answer_text, complete_settings, decode, start_decoding


def answer_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    image_features: Sequence[Tensor | None] | None = None,
    *,
    seed: int = 0,
    **kwargs: Any,
) -> list[str]:
    """Answer prompts together.

    Args:
        prompts: token ids, each ending where its answer begins.
        image_features: for each prompt, features (image tokens of the prompt, D), or None where it has no image.
        seed: each answer is what `answer_ids` gives after `torch.manual_seed(seed)`: it depends on no other prompt.
        kwargs: generation settings; those that are left open are taken from the model's own.

    Returns:
        The answers' texts, in the prompts' order; see `answer_ids`. In bf16 and fp16 the larger matrices round
        differently from one row's, so a token that is nearly as likely as another may be drawn in its place.

    Raises:
        ValueError: for an empty prompt, one that leaves no room within `max_length`, or features that do not fit.
    """
    if not prompts:
        return []
    config, inputs = complete_settings(model, tokenizer, None, kwargs)
    features = image_features or [None] * len(prompts)
    if (config.num_beams or 1) > 1:  # beams are a batch already
        answers = []
        for prompt, row in zip(prompts, features, strict=True):
            torch.manual_seed(seed)
            images: dict[str, Any] = {} if row is None else {"image_features": row}
            answers.append(answer_ids(model, tokenizer, torch.tensor([list(prompt)]), **images, **kwargs))
        return answers
    new_ids = generate_batch(model, prompts, features, config, seed=seed, **inputs)
    return [answer_text(tokenizer, row, config.eos_token_id) for row in new_ids]


def generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    image_features: Sequence[Tensor | None],
    config: GenerationConfig,
    *,
    seed: int = 0,
    **inputs: Any,
) -> list[list[int]]:
    """Return the new token ids of each answer, its stop token included; see `answer_batch` for the arguments."""
    generators = [torch.Generator(model.device).manual_seed(seed) for _ in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    for step in start_decoding(decode, model, prompts, image_features, generators, config, inputs):
        for row, token in step.items():
            answers[row].append(token)
    return answers
