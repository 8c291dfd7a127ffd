"""The one loop that draws tokens, for a single answer, a stream or a batch.

Settings (temperature, top_p, repetition penalty, …) work as in transformers: its `generate` makes them logits
processors and stopping criteria, and calls `decode` with them. The tokens are those that `generate` draws itself.

Shape legend: B rows that are still being answered, T tokens of the longest prompt and of the answers so far, V
vocabulary, D the model's width.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig

TokenLoop = Callable[..., Iterator[dict[int, int]]]
"""Draws tokens; called as `decode` is, and gives what it gives."""


@torch.no_grad()
def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    limits: Sequence[int],
    generators: Sequence[torch.Generator | None],
    **inputs: Any,
) -> Iterator[dict[int, int]]:
    """Draw token after token until all rows have ended. A row that has ended leaves the batch.

    Args:
        model: the language model.
        input_ids: (B, T) prompts, padded on the left.
        logits_processor: what `generate` has made of the settings: changes the scores of the next token.
        stopping_criteria: likewise: says which rows have ended.
        generation_config: says whether to sample.
        limits: the most tokens of each row's answer.
        generators: what each row's tokens are sampled with; None is PyTorch's own.
        inputs: `past_key_values`, which may hold the prompt's beginning; `attention_mask`; `image_features`, a tuple of
            (image tokens, D), for the rest of the prompt.

    Yields:
        The next token of every row that has not ended, by the row's number.
    """
    ids = input_ids  # (B, T)
    mask = inputs.get("attention_mask")  # (B, T), or None: `generate` leaves it out where nothing is padded
    cache = inputs["past_key_values"]
    features = inputs.get("image_features")
    images = {} if features is None else {"image_features": torch.cat(features)}
    rows = list(range(len(ids)))  # the numbers of the rows that the tensors still hold
    for length in itertools.count(1):
        new = ids[:, cache.get_seq_length() :]  # (B, T) the prompt at first, then (B, 1)
        out = model(
            input_ids=new, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **images
        )
        images = {}  # the cache holds them from now on
        scores = logits_processor(ids, out.logits[:, -1].float())  # (B, V)
        tokens = _draw(scores, [generators[row] for row in rows] if generation_config.do_sample else None)  # (B,)
        ids = torch.cat((ids, tokens[:, None]), dim=1)  # (B, T + 1)
        mask = None if mask is None else F.pad(mask, (0, 1), value=1)
        yield dict(zip(rows, tokens.tolist(), strict=True))

        has_ended = torch.as_tensor(stopping_criteria(ids, scores)).tolist()
        stay = [at for at, row in enumerate(rows) if not has_ended[at] and length < limits[row]]
        if not stay:
            return
        if len(stay) < len(rows):
            rows = [rows[at] for at in stay]
            kept = torch.tensor(stay, device=ids.device)
            ids, mask = ids[kept], None if mask is None else mask[kept]
            cache.select_rows(kept)


def _draw(scores: Tensor, generators: Sequence[torch.Generator | None] | None) -> Tensor:
    """Return the next tokens (B,) for scores (B, V): the likeliest, or one drawn by each row's own generator."""
    if generators is None:
        return scores.argmax(dim=-1)
    probabilities = scores.softmax(dim=-1)
    drawn = [
        torch.multinomial(probabilities[row : row + 1], num_samples=1, generator=generator)
        for row, generator in enumerate(generators)
    ]
    return torch.cat(drawn)[:, 0]


def start_decoding(
    loop: TokenLoop,
    model: Any,
    prompts: Sequence[Sequence[int]],
    image_features: Sequence[Tensor | None],
    generators: Sequence[torch.Generator | None],
    config: GenerationConfig,
    inputs: dict[str, Any],
) -> Iterator[dict[int, int]]:
    """Have `generate` check the settings and start the loop, which computes nothing before the first step is taken."""
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty: expected at least one token")
    limits = _length_limits(prompts, config)
    config = copy.deepcopy(config)
    config.max_new_tokens, config.max_length = max(limits), None
    ids, mask = pad_left(prompts, model.device)
    if any(row is not None for row in image_features):
        none = torch.empty(0, model.config.hidden_size, device=model.device)
        inputs["image_features"] = tuple(none if row is None else row.flatten(0, -2) for row in image_features)
    steps: Iterator[dict[int, int]] = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        custom_generate=loop,
        limits=limits,
        generators=generators,
        **inputs,
    )
    return steps


def _length_limits(prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[int]:
    """Return the most tokens of each answer; `max_length` counts the prompt without its padding."""
    if config.max_new_tokens is not None:
        return [config.max_new_tokens] * len(prompts)
    limits = [config.max_length - len(prompt) for prompt in prompts]
    if min(limits) < 1:
        raise ValueError(
            f"a prompt has {max(map(len, prompts))} tokens, which leaves no room for an answer within max_length "
            f"{config.max_length}; set max_new_tokens"
        )
    return limits


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Stack prompts, and return ids and mask (B, T).

    A row is padded with its own first token: one that it does not hold would count where settings look at what was said
    before (`repetition_penalty`).
    """
    longest = max(len(prompt) for prompt in prompts)
    rows = [[prompt[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    masks = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(masks, device=device)
