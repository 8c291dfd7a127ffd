"""Multi-turn chat in ChatML: `model.chat(…)` and `model.chat_stream(…)`, which `qwen/__init__.py` makes methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .answering import answer_ids, decode, merge_settings
from .chatml import DEFAULT_MAX_WINDOW_SIZE, Turn
from .conversation import build_prompt
from .modeling_qwen import QWenLMHeadModel
from .sampling_loop import library_decode
from .streaming import stream_ids
from .tokenization_qwen import QWenTokenizer

DEFAULT_SYSTEM = "You are a helpful assistant."


def chat(
    model: QWenLMHeadModel,
    tokenizer: QWenTokenizer,
    query: str,
    history: Sequence[Turn] | None = None,
    system: str = DEFAULT_SYSTEM,
    *,
    generation_config: GenerationConfig | None = None,
    **kwargs: Any,
) -> tuple[str, list[Turn]]:
    """Answer a question.

    Args:
        query: the question; no special token in it is parsed.
        history: earlier (question, answer) pairs, oldest first. The newest that fit into `max_window_size` tokens
            (`generation_config.json`; else 6144) are kept.
        system: the system prompt.
        generation_config: what it leaves open is taken from the model's own; by default that one alone.
        kwargs: generation settings, which come first, as `generate` takes them. The answer ends at
            `<|im_end|>`, `<|im_start|>` or `<|endoftext|>` unless `eos_token_id` says otherwise.
            `prompt_cache=PromptCache()`, one for a conversation, keeps what was read from turn to turn.

    Returns:
        The answer without its stop token, and a new history that ends with this turn.
    """
    input_ids = _chat_prompt(model, tokenizer, query, history, system, generation_config, kwargs)
    answer = answer_ids(model, tokenizer, input_ids, generation_config, **kwargs)
    return answer, [*((q, a) for q, a in history or ()), (query, answer)]


def chat_stream(
    model: QWenLMHeadModel,
    tokenizer: QWenTokenizer,
    query: str,
    history: Sequence[Turn] | None = None,
    system: str = DEFAULT_SYSTEM,
    *,
    generation_config: GenerationConfig | None = None,
    **kwargs: Any,
) -> Iterator[str]:
    """Answer a question as `chat` does, which see for the arguments, and show the answer while it grows.

    Returns:
        An iterator of the whole answer so far; the last is what `chat` gives under the same seed.
    """
    input_ids = _chat_prompt(model, tokenizer, query, history, system, generation_config, kwargs)
    config, _ = merge_settings(model, generation_config, kwargs)
    loop = library_decode if config.do_sample else decode
    return stream_ids(model, tokenizer, input_ids, generation_config, loop=loop, **kwargs)


def _chat_prompt(
    model: QWenLMHeadModel,
    tokenizer: QWenTokenizer,
    query: str,
    history: Sequence[Turn] | None,
    system: str,
    generation_config: GenerationConfig | None,
    overrides: dict[str, Any],
) -> Tensor:
    """Return the prompt's ids (1, T). `generate` does not know `max_window_size`: it is taken out of `overrides`."""
    config, _ = merge_settings(model, generation_config, {})
    window = overrides.pop("max_window_size", None) or getattr(config, "max_window_size", DEFAULT_MAX_WINDOW_SIZE)
    ids, _ = build_prompt(tokenizer, query, history, system, window)
    return torch.tensor([ids])
