"""Answers to one prompt, and the one loop of tokens, which `streaming.py` and `batch_answering.py` use too.

Settings (temperature, top_p, repetition penalty, …) work as in transformers: its `generate` makes them logits
processors and stopping criteria, and calls `decode` with them. The tokens are those that `generate` draws itself.
Settings that are left open are taken from the model's `generation_config.json`.

Shape legend: B rows that are still being answered, T tokens of the longest prompt and of the answers so far, V
vocabulary, D the model's width.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig

from .prompt_cache import PromptCache

DEFAULT_MAX_NEW_TOKENS = 512  # the published chat models'
MOST_EXTREME = 1e30  # larger temperatures and penalties, or smaller ones than 1 / this, could make scores infinite

TokenLoop = Callable[..., Iterator[dict[int, int]]]  # draws tokens, as `decode` does


def answer_ids(
    model: Any,
    tokenizer: Any,
    input_ids: Tensor,
    generation_config: GenerationConfig | None = None,
    *,
    prompt_cache: PromptCache | None = None,
    **kwargs: Any,
) -> str:
    """Answer a prompt.

    Args:
        model: a model with `generate`, or one wrapped by PEFT.
        tokenizer: of the language model: QWen's, or another with the same methods.
        input_ids: (1, T), a prompt that ends where the answer begins.
        generation_config: what it leaves open is taken from the model's own; by default that one alone.
        prompt_cache: what a chat has read before; the answer is the same with and without. Beams do not use it.
        kwargs: generation settings, which come first (`max_new_tokens=…`), and model inputs (`image_features=…`).

    Returns:
        The text of every token generated before the first stop token: `<|im_end|>`, `<|im_start|>`,
        `<|endoftext|>` and the configuration's own `eos_token_id`, or those of `eos_token_id` alone where it is given.

    Raises:
        ValueError: if `input_ids` is not one row, or for settings that can't be used.
    """
    check_one_row(input_ids)
    config, inputs = complete_settings(model, tokenizer, generation_config, kwargs)
    if (config.num_beams or 1) > 1:
        input_ids = input_ids.to(model.device)
        mask = torch.ones_like(input_ids)  # without it, `generate` would take a prompt's <|endoftext|> for padding
        output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config, **inputs)
        new_ids = output[0, input_ids.shape[1] :].tolist()
    else:
        new_ids = list(new_tokens(model, input_ids, config, inputs, prompt_cache))
    return answer_text(tokenizer, new_ids, config.eos_token_id)


def answer_text(tokenizer: Any, new_ids: Iterable[int], stop_ids: Sequence[int]) -> str:
    """Return the text of the tokens before the first stop token, or of all of them if there is none."""
    return str(tokenizer.decode(list(itertools.takewhile(lambda index: index not in stop_ids, new_ids))))


# ---- Settings


def merge_settings(
    model: Any, generation_config: GenerationConfig | None, overrides: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Merge `overrides`, `generation_config` and the model's own, in this order; also return the model inputs."""
    config = copy.deepcopy(generation_config) if generation_config is not None else GenerationConfig()
    config.update(**model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    return config, config.update(**overrides)


def complete_settings(
    model: Any, tokenizer: Any, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Merge the settings, and decide everything that `generate` would otherwise guess."""
    config, inputs = merge_settings(model, generation_config, kwargs)
    if (config.num_return_sequences or 1) > 1:
        raise ValueError(f"num_return_sequences is {config.num_return_sequences}: one answer is given; call generate")
    if config.cache_implementation is not None:
        raise ValueError(f"cache_implementation is {config.cache_implementation!r}: answers use a cache of their own")
    if not config.do_sample:  # otherwise each greedy answer warns of sampling settings that nobody asked for
        config.temperature, config.top_p, config.top_k = 1.0, 1.0, 50
    for name in ("temperature", "repetition_penalty"):
        value = getattr(config, name)
        if value is not None and not 1 / MOST_EXTREME <= value <= MOST_EXTREME:
            raise ValueError(f"{name} is {value}: scores would overflow; use 1e-30 to 1e30, or leave it out")
    config.return_dict_in_generate, config.use_cache = False, True
    stops = [] if config.eos_token_id is None else torch.as_tensor(config.eos_token_id).flatten().tolist()
    if kwargs.get("eos_token_id") is None:
        stops = list(dict.fromkeys([*tokenizer.stop_ids, *stops]))
    config.eos_token_id = stops
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.eod_id
    if config.max_new_tokens is None and config.max_length is None:
        config.max_new_tokens = DEFAULT_MAX_NEW_TOKENS
    return config, inputs


def check_one_row(input_ids: Tensor) -> None:
    """Refuse anything but one prompt."""
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected one prompt: (1, T) with T at least 1")


# ---- Tokens


def new_tokens(
    model: Any,
    input_ids: Tensor,
    config: GenerationConfig,
    inputs: dict[str, Any],
    prompt_cache: PromptCache | None,
    loop: TokenLoop | None = None,
) -> Iterator[int]:
    """Draw the tokens of one answer, its stop token included, as they are asked for."""
    prompt = input_ids[0].tolist()
    features = inputs.pop("image_features", None)
    if features is not None:
        features = torch.cat(features) if isinstance(features, tuple) else features
        features = features.flatten(0, -2)  # (image tokens, D)
    if prompt_cache is not None:
        inputs["past_key_values"], features = prompt_cache.reuse(model, prompt, features)
    for step in start_decoding(loop or decode, model, [prompt], [features], [None], config, inputs):
        if prompt_cache is not None:
            prompt_cache.add(step[0])
        yield step[0]


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
    limits = [config.max_new_tokens] * len(prompts)  # the most tokens of each answer
    if config.max_new_tokens is None:
        limits = [config.max_length - len(prompt) for prompt in prompts]  # the prompt counts without its padding
        if min(limits) < 1:
            raise ValueError(
                f"a prompt has {max(map(len, prompts))} tokens, which leaves no room for an answer within max_length "
                f"{config.max_length}; set max_new_tokens"
            )
    config = copy.deepcopy(config)
    config.max_new_tokens, config.max_length = max(limits), None
    if any(row is not None for row in image_features):
        none = torch.empty(0, model.config.hidden_size, device=model.device)
        inputs["image_features"] = tuple(none if row is None else row.flatten(0, -2) for row in image_features)
    ids, mask = pad_left(prompts, model.device)
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


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Stack prompts, and return ids and mask (B, T).

    A row is padded with its own first token: one that it does not hold would count where settings look at what was said
    before (`repetition_penalty`).
    """
    longest = max(map(len, prompts))
    rows = [[prompt[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    masks = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(masks, device=device)


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
        logits_processor: changes the scores of the next token; made of the settings by `generate`.
        stopping_criteria: says which rows have ended; likewise.
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
        scores = out.logits[:, -1].float()  # (B, V)
        # An image token beyond the vocabulary has no score; what looks at earlier tokens sees the first one instead.
        scores = logits_processor(torch.where(ids < scores.shape[-1], ids, ids[:, :1]), scores)
        if generation_config.do_sample:
            own = [generators[row] for row in rows]
            drawn = [torch.multinomial(row, 1, generator=one) for row, one in zip(scores.softmax(-1), own, strict=True)]
            tokens = torch.cat(drawn)  # (B,)
        else:
            tokens = scores.argmax(dim=-1)  # (B,)
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
