"""Answers to many prompts at once, each the one that its prompt would get alone.

Prompts are padded on the left. A row ends at its own stop token or length limit and then leaves the batch. Where
tokens are sampled, every row has a generator of its own, so that no answer depends on what is asked beside it.

Shape legend: B rows that are still being answered, T tokens of the longest prompt, D the model's width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .chatml import trim_answer
from .growing_cache import GrowingCache
from .stream import answer_ids, settle
from .tokenization_qwen import QWenTokenizer


def answer_batch(
    model: Any,
    tokenizer: QWenTokenizer,
    prompts: Sequence[Sequence[int]],
    image_features: Sequence[Tensor | None] | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    seed: int = 0,
    **kwargs: Any,
) -> list[str]:
    """Answer prompts.

    Args:
        model: a model with `generate`.
        tokenizer: QWen's tokenizer.
        prompts: token ids, each ending where its answer begins.
        image_features: for each prompt, features (image tokens of the prompt, D), or None where it has no image.
        generation_config: as `answer_ids` takes it.
        seed: each answer is what `answer_ids` gives after `torch.manual_seed(seed)`.
        kwargs: generation settings, which come first.

    Returns:
        The answers' texts, in the prompts' order; see `answer_ids`. In bf16 and fp16 the larger matrices round
        otherwise than one row's do, so a token that is nearly as likely as another may be drawn in its place.

    Raises:
        ValueError: for an empty prompt, one that leaves no room within `max_length`, or features that do not fit.
    """
    if not prompts:
        return []
    config, model_kwargs = settle(model, tokenizer, generation_config, kwargs)
    features = list(image_features or [None] * len(prompts))
    if (config.num_beams or 1) > 1:  # beams already are a batch
        return [
            _answer_alone(model, tokenizer, prompt, row, generation_config, seed, kwargs)
            for prompt, row in zip(prompts, features, strict=True)
        ]
    answers = generate_batch(model, prompts, features, config, seed=seed, **model_kwargs)
    return [str(tokenizer.decode(trim_answer(answer, config.eos_token_id))) for answer in answers]


def generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    image_features: Sequence[Tensor | None],
    generation_config: GenerationConfig | None = None,
    *,
    seed: int = 0,
    **kwargs: Any,
) -> list[list[int]]:
    """The new token ids of each answer, its stop token included; see `answer_batch` for the arguments.

    Raises:
        ValueError: as `answer_batch` does.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty: expected at least one token")
    config = copy.deepcopy(generation_config) if generation_config is not None else GenerationConfig()
    inputs = config.update(**kwargs)
    limits = _limits(prompts, config)
    config.max_new_tokens, config.max_length = max(limits), None
    ids, mask = pad_left(prompts, model.device)
    if any(row is not None for row in image_features):
        empty = torch.empty(0, model.config.hidden_size, device=model.device)
        inputs["image_features"] = tuple(empty if row is None else row.flatten(0, -2) for row in image_features)
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        custom_generate=_decode_rows,
        limits=limits,
        seed=seed,
        **inputs,
    )


def check_settings(model: Any, tokenizer: QWenTokenizer, **kwargs: Any) -> None:
    """Have `generate` get ready for an answer and compute none: settings that it rejects, it rejects for every prompt.

    Args:
        model: a model with `generate`.
        tokenizer: QWen's tokenizer.
        kwargs: generation settings, as `answer_batch` takes them.

    Raises:
        ValueError: for settings that can't be used.
    """
    config, model_kwargs = settle(model, tokenizer, None, kwargs)
    # Whether a prompt leaves room within `max_length` is a matter of the prompt.
    config.max_new_tokens, config.max_length = config.max_new_tokens or config.max_length, None
    ids = torch.tensor([[tokenizer.eod_id]], device=model.device)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        custom_generate=_decode_nothing,
        **model_kwargs,
    )


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Stack prompts; gives ids and mask (B, T).

    A row is padded with its own first token: one that it does not hold would count where settings look at what was said
    before (`repetition_penalty`).
    """
    longest = max(len(prompt) for prompt in prompts)
    rows = [[prompt[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    masks = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(masks, device=device)


def _limits(prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[int]:
    """The most tokens of each answer; `max_length` counts the prompt without its padding."""
    if config.max_new_tokens is not None:
        return [config.max_new_tokens] * len(prompts)
    limits = [config.max_length - len(prompt) for prompt in prompts]
    if min(limits) < 1:
        raise ValueError(
            f"a prompt has {max(map(len, prompts))} tokens, which leaves no room for an answer within max_length "
            f"{config.max_length}; give --max_new_tokens"
        )
    return limits


def _answer_alone(
    model: Any,
    tokenizer: QWenTokenizer,
    prompt: Sequence[int],
    features: Tensor | None,
    generation_config: GenerationConfig | None,
    seed: int,
    kwargs: dict[str, Any],
) -> str:
    torch.manual_seed(seed)
    images: dict[str, Any] = {} if features is None else {"image_features": (features.flatten(0, -2),)}
    return answer_ids(model, tokenizer, torch.tensor([list(prompt)]), generation_config, **images, **kwargs)


def _decode_rows(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    limits: Sequence[int],
    seed: int,
    **model_kwargs: Any,
) -> list[list[int]]:
    """Draw tokens until all rows have ended, as a decoding method that `generate` calls; gives each row's new ids."""
    answers: list[list[int]] = [[] for _ in input_ids]
    generators = [torch.Generator(input_ids.device).manual_seed(seed) for _ in input_ids]
    live = list(range(len(input_ids)))  # the rows that the tensors still hold
    cache = GrowingCache(model.config)
    # Without any padding, `generate` may have left the mask out.
    ids, mask, new = input_ids, model_kwargs.get("attention_mask"), input_ids
    features = model_kwargs.get("image_features")
    images = {} if features is None else {"image_features": torch.cat(features)}
    while True:
        out = model(
            input_ids=new, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **images
        )
        images = {}
        scores = logits_processor(ids, out.logits[:, -1].float())
        tokens = _draw(scores, [generators[row] for row in live] if generation_config.do_sample else None)
        ids = torch.cat((ids, tokens[:, None]), dim=1)
        mask = None if mask is None else torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
        for row, token in zip(live, tokens.tolist(), strict=True):
            answers[row].append(token)
        ended = torch.as_tensor(stopping_criteria(ids, scores)).tolist()
        stay = [at for at, row in enumerate(live) if not ended[at] and len(answers[row]) < limits[row]]
        if not stay:
            return answers
        if len(stay) < len(live):
            live = [live[at] for at in stay]
            rows = torch.tensor(stay, device=ids.device)
            ids, mask, tokens = ids[rows], None if mask is None else mask[rows], tokens[rows]
            cache.keep_rows(rows)
        new = tokens[:, None]


def _decode_nothing(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Tensor:
    """Answer with the prompt, as a decoding method that `generate` calls once all is ready."""
    return input_ids


def _draw(scores: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
    """Next tokens (B,) from scores (B, vocabulary): the likeliest, or one drawn by each row's own generator."""
    if generators is None:
        return scores.argmax(dim=-1)
    probabilities = scores.softmax(dim=-1)
    drawn = [
        torch.multinomial(probabilities[row : row + 1], num_samples=1, generator=generator)
        for row, generator in enumerate(generators)
    ]
    return torch.cat(drawn)[:, 0]
