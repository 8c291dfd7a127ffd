"""Answers to prompts; the tokens of all of them are drawn by one loop (see `decoding.py`):

    answer_ids      one prompt    → the answer
    stream_ids      one prompt    → the answer while it grows
    answer_batch    many prompts  → the answer that each would get alone

Settings that are left open are taken from the model's `generation_config.json`. Shape legend: T tokens of a prompt, D
the model's width.
"""

from __future__ import annotations

import codecs
import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .cache import PromptCache
from .chatml import stop_token_ids, trim_answer
from .decoding import TokenLoop, decode, start_decoding
from .tokenization_qwen import QWenTokenizer

DEFAULT_MAX_NEW_TOKENS = 512
"""Length limit of an answer where neither caller nor `generation_config.json` sets one: the published chat models'."""

MOST_EXTREME = 1e30
"""Larger temperatures and penalties, or smaller ones than 1 / this, could make scores infinite."""


# ---- One prompt


def answer_ids(
    model: Any,
    tokenizer: QWenTokenizer,
    input_ids: Tensor,
    generation_config: GenerationConfig | None = None,
    *,
    prompt_cache: PromptCache | None = None,
    **kwargs: Any,
) -> str:
    """Answer a prompt.

    Args:
        model: a model with `generate`, or one wrapped by PEFT.
        tokenizer: QWen's tokenizer.
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
    _check_one_row(input_ids)
    config, inputs = _complete_settings(model, tokenizer, generation_config, kwargs)
    if (config.num_beams or 1) > 1:
        input_ids = input_ids.to(model.device)
        mask = torch.ones_like(input_ids)  # without it, `generate` would take a prompt's <|endoftext|> for padding
        output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config, **inputs)
        new_ids = output[0, input_ids.shape[1] :].tolist()
    else:
        new_ids = list(_new_tokens(model, input_ids, config, inputs, prompt_cache))
    return _answer_text(tokenizer, new_ids, config)


def stream_ids(
    model: Any,
    tokenizer: QWenTokenizer,
    input_ids: Tensor,
    generation_config: GenerationConfig | None = None,
    *,
    prompt_cache: PromptCache | None = None,
    loop: TokenLoop = decode,
    **kwargs: Any,
) -> Iterator[str]:
    """Answer a prompt as `answer_ids` does, which see for the arguments, and show the answer while it grows.

    Tokens are drawn only while the iterator is used: closing or dropping it ends the answer.

    Args:
        loop: what draws the tokens, `decode` or `sampling_loop.library_decode`.

    Returns:
        An iterator of the whole text so far, longer each time; the last is what `answer_ids` gives (an empty answer
        is given too). A character is held back until all its bytes are there.

    Raises:
        ValueError: as for `answer_ids`, and if beams are asked for: their text is not known before the end.
    """
    _check_one_row(input_ids)
    config, inputs = _complete_settings(model, tokenizer, generation_config, kwargs)
    if (config.num_beams or 1) > 1:
        raise ValueError(f"num_beams is {config.num_beams}: beams can't be streamed; use 1, or ask without streaming")
    tokens = _new_tokens(model, input_ids, config, inputs, prompt_cache, loop)
    return decode_growing(tokenizer, itertools.takewhile(lambda token: token not in config.eos_token_id, tokens))


def _check_one_row(input_ids: Tensor) -> None:
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected one prompt: (1, T) with T at least 1")


def _new_tokens(
    model: Any,
    input_ids: Tensor,
    config: GenerationConfig,
    inputs: dict[str, Any],
    prompt_cache: PromptCache | None,
    loop: TokenLoop = decode,
) -> Iterator[int]:
    """Draw the tokens of one answer, its stop token included, as they are asked for."""
    prompt = input_ids[0].tolist()
    features = inputs.pop("image_features", None)
    if features is not None:
        features = torch.cat(features) if isinstance(features, tuple) else features
        features = features.flatten(0, -2)  # (image tokens, D)
    if prompt_cache is not None:
        inputs["past_key_values"], features = prompt_cache.reuse(model, prompt, features)
    for step in start_decoding(loop, model, [prompt], [features], [None], config, inputs):
        if prompt_cache is not None:
            prompt_cache.add(step[0])
        yield step[0]


def decode_growing(tokenizer: QWenTokenizer, token_ids: Iterable[int]) -> Iterator[str]:
    """Decode token ids as they come.

    Args:
        tokenizer: QWen's tokenizer.
        token_ids: ids, none of which is left out.

    Yields:
        The whole text so far, whenever it has grown, and at the end if nothing was given yet. Bytes that may still
        become a character are held back; the last text is `tokenizer.decode` of all ids.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(tokenizer.errors)
    text = ""
    for index in token_ids:
        token = tokenizer.convert_ids_to_tokens(index)
        new = decoder.decode(token if isinstance(token, bytes) else token.encode())
        if new:
            text += new
            yield text
    rest = decoder.decode(b"", final=True)
    if rest or not text:
        yield text + rest


# ---- Many prompts


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
    """Answer prompts together.

    Args:
        model: a model with `generate`.
        tokenizer: QWen's tokenizer.
        prompts: token ids, each ending where its answer begins.
        image_features: for each prompt, features (image tokens of the prompt, D), or None where it has no image.
        generation_config: as `answer_ids` takes it.
        seed: each answer is what `answer_ids` gives after `torch.manual_seed(seed)`: it depends on no other prompt.
        kwargs: generation settings, which come first.

    Returns:
        The answers' texts, in the prompts' order; see `answer_ids`. In bf16 and fp16 the larger matrices round
        differently from one row's, so a token that is nearly as likely as another may be drawn in its place.

    Raises:
        ValueError: for an empty prompt, one that leaves no room within `max_length`, or features that do not fit.
    """
    if not prompts:
        return []
    config, inputs = _complete_settings(model, tokenizer, generation_config, kwargs)
    features = image_features or [None] * len(prompts)
    if (config.num_beams or 1) > 1:  # beams are a batch already
        answers = []
        for prompt, row in zip(prompts, features, strict=True):
            torch.manual_seed(seed)
            images: dict[str, Any] = {} if row is None else {"image_features": row}
            ids = torch.tensor([list(prompt)])
            answers.append(answer_ids(model, tokenizer, ids, generation_config, **images, **kwargs))
        return answers
    new_ids = generate_batch(model, prompts, features, config, seed=seed, **inputs)
    return [_answer_text(tokenizer, row, config) for row in new_ids]


def generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    image_features: Sequence[Tensor | None],
    generation_config: GenerationConfig | None = None,
    *,
    seed: int = 0,
    **kwargs: Any,
) -> list[list[int]]:
    """Return the new token ids of each answer, its stop token included; see `answer_batch` for the arguments.

    Raises:
        ValueError: as `answer_batch` does.
    """
    config = copy.deepcopy(generation_config) if generation_config is not None else GenerationConfig()
    inputs = config.update(**kwargs)
    generators = [torch.Generator(model.device).manual_seed(seed) for _ in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    for step in start_decoding(decode, model, prompts, image_features, generators, config, inputs):
        for row, token in step.items():
            answers[row].append(token)
    return answers


# ---- What they share


def complete_config(model: Any, generation_config: GenerationConfig | None, **overrides: Any) -> GenerationConfig:
    """Merge generation settings: `overrides`, then `generation_config`, then the model's own.

    Settings that only the model's `generation_config.json` knows (`max_window_size`, …) are carried over.

    Returns:
        A configuration of its own; overrides that are no generation settings are left out.
    """
    return _merge(model, generation_config, overrides)[0]


def check_settings(model: Any, tokenizer: QWenTokenizer, **kwargs: Any) -> None:
    """Have `generate` get ready for an answer and draw none: settings that it rejects, it rejects for every prompt.

    Args:
        model: a model with `generate`.
        tokenizer: QWen's tokenizer.
        kwargs: generation settings, as `answer_batch` takes them.

    Raises:
        ValueError: for settings that can't be used.
    """
    config, inputs = _complete_settings(model, tokenizer, None, kwargs)
    # Whether a prompt leaves room within `max_length` is a matter of the prompt.
    config.max_new_tokens, config.max_length = config.max_new_tokens or config.max_length, None
    start_decoding(decode, model, [[tokenizer.eod_id]], [None], [None], config, inputs)


def _merge(
    model: Any, generation_config: GenerationConfig | None, overrides: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Return the settings, and those of `overrides` that are none (model inputs)."""
    config = copy.deepcopy(generation_config) if generation_config is not None else GenerationConfig()
    config.update(**model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    return config, config.update(**overrides)


def _complete_settings(
    model: Any, tokenizer: QWenTokenizer, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Merge the settings, and decide everything that `generate` would otherwise guess; also return the model inputs."""
    config, inputs = _merge(model, generation_config, kwargs)
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
        stops = list(dict.fromkeys([*stop_token_ids(tokenizer), *stops]))
    config.eos_token_id = stops
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.eod_id
    if config.max_new_tokens is None and config.max_length is None:
        config.max_new_tokens = DEFAULT_MAX_NEW_TOKENS
    return config, inputs


def _answer_text(tokenizer: QWenTokenizer, new_ids: Sequence[int], config: GenerationConfig) -> str:
    return str(tokenizer.decode(trim_answer(new_ids, config.eos_token_id)))
