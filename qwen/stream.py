"""Answers to ready-made prompts of one row, whole or token by token.

A sampled stream is drawn by transformers_stream_generator, a greedy one comes from transformers' own streamer; both
give the tokens that `generate` gives under the same seed (`torch.manual_seed` before the first token is taken).
"""

from __future__ import annotations

import codecs
import contextlib
import copy
import threading
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from .chatml import stop_token_ids, trim_answer
from .prompt_cache import PromptCache, StillRunningError
from .sampling_loop import sampled_tokens
from .tokenization_qwen import QWenTokenizer

DEFAULT_MAX_NEW_TOKENS = 512
"""Length limit of an answer where neither caller nor `generation_config.json` sets one: the published chat models'."""


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
        prompt_cache: what a chat has read before; the answer is the same with and without.
        kwargs: generation settings, which come first (`max_new_tokens=…`), and model inputs (`image_features=…`).

    Returns:
        The text of every token generated before the first stop token: `<|im_end|>`, `<|im_start|>`,
        `<|endoftext|>` and the configuration's own `eos_token_id`, or those of `eos_token_id` alone where it is given.

    Raises:
        ValueError: if `input_ids` is not one row, or several answers are asked for.
    """
    input_ids, config, model_kwargs = _prepare(model, tokenizer, input_ids, generation_config, kwargs)
    prompt = input_ids[0].tolist()
    keeps = prompt_cache is not None and prompt_cache.serves(config)
    if prompt_cache is not None and keeps:
        prompt_cache.begin(model, prompt, model_kwargs)
    output = model.generate(input_ids=input_ids, generation_config=config, **model_kwargs)
    new_ids = output[0, input_ids.shape[1] :].tolist()
    if prompt_cache is not None and keeps:
        prompt_cache.read(prompt, new_ids)
    return str(tokenizer.decode(trim_answer(new_ids, config.eos_token_id)))


def stream_ids(
    model: Any,
    tokenizer: QWenTokenizer,
    input_ids: Tensor,
    generation_config: GenerationConfig | None = None,
    *,
    prompt_cache: PromptCache | None = None,
    **kwargs: Any,
) -> Iterator[str]:
    """Answer a prompt as `answer_ids` does, which see for the arguments, and show the answer while it grows.

    Generation goes on only while the iterator is used: closing or dropping it ends it.

    Returns:
        An iterator of the whole text so far, longer each time; the last is what `answer_ids` gives (an empty answer
        is given too). A character is held back until all its bytes are there.

    Raises:
        ValueError: as for `answer_ids`, and if beams are asked for: their text is not known before the end.
    """
    input_ids, config, model_kwargs = _prepare(model, tokenizer, input_ids, generation_config, kwargs)
    if (config.num_beams or 1) > 1:
        raise ValueError(f"num_beams is {config.num_beams}: beams can't be streamed; use 1, or ask without streaming")
    tokens = _new_tokens(model, input_ids, config, model_kwargs, prompt_cache)
    return _growing_text(tokenizer, tokens, frozenset(config.eos_token_id))


def _new_tokens(
    model: Any,
    input_ids: Tensor,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    prompt_cache: PromptCache | None,
) -> Iterator[int]:
    draw = sampled_tokens if config.do_sample else _greedy_tokens
    if prompt_cache is None or not prompt_cache.serves(config):
        yield from draw(model, input_ids, config, model_kwargs)
        return
    prompt = input_ids[0].tolist()
    prompt_cache.begin(model, prompt, model_kwargs)  # not before the first token is asked for
    yield from prompt_cache.watch(prompt, draw(model, input_ids, config, model_kwargs))


def complete_config(model: Any, generation_config: GenerationConfig | None, **overrides: Any) -> GenerationConfig:
    """Merge generation settings: `overrides`, then `generation_config`, then the model's own.

    Settings that only the model's `generation_config.json` knows (`max_window_size`, …) are carried over.

    Returns:
        A configuration of its own; overrides that are no generation settings are left out.
    """
    return _merge(model, generation_config, overrides)[0]


def _merge(
    model: Any, generation_config: GenerationConfig | None, overrides: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    config = copy.deepcopy(generation_config) if generation_config is not None else GenerationConfig()
    config.update(**model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    return config, config.update(**overrides)


def settle(
    model: Any, tokenizer: QWenTokenizer, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Settle everything that `generate` would otherwise guess.

    Args:
        model: a model with `generate`.
        tokenizer: QWen's tokenizer.
        generation_config: what it leaves open is taken from the model's own.
        kwargs: generation settings, which come first, and model inputs.

    Returns:
        Complete settings, where an answer ends among them, and the model inputs.

    Raises:
        ValueError: if several answers to a prompt are asked for.
    """
    config, model_kwargs = _merge(model, generation_config, kwargs)
    if (config.num_return_sequences or 1) > 1:
        raise ValueError(f"num_return_sequences is {config.num_return_sequences}: one answer is given; call generate")
    config.return_dict_in_generate = False
    stops = [] if config.eos_token_id is None else torch.as_tensor(config.eos_token_id).flatten().tolist()
    if kwargs.get("eos_token_id") is None:
        stops = list(dict.fromkeys([*stop_token_ids(tokenizer), *stops]))
    config.eos_token_id = stops
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.eod_id
    if config.max_new_tokens is None and config.max_length is None:
        config.max_new_tokens = DEFAULT_MAX_NEW_TOKENS
    if not config.do_sample:  # else each greedy answer warns of sampling settings that nobody asked for
        config.temperature, config.top_p, config.top_k = 1.0, 1.0, 50
    return config, model_kwargs


def _prepare(
    model: Any,
    tokenizer: QWenTokenizer,
    input_ids: Tensor,
    generation_config: GenerationConfig | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, GenerationConfig, dict[str, Any]]:
    """Check the prompt, and settle the rest."""
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected one prompt: (1, T) with T at least 1")
    config, model_kwargs = settle(model, tokenizer, generation_config, kwargs)
    input_ids = input_ids.to(model.device)
    if model_kwargs.get("attention_mask") is None:
        # Without a mask, `generate` would take a prompt's own <|endoftext|> for padding.
        model_kwargs["attention_mask"] = torch.ones_like(input_ids)
    return input_ids, config, model_kwargs


def _growing_text(tokenizer: QWenTokenizer, tokens: Iterator[int], stops: frozenset[int]) -> Iterator[str]:
    with contextlib.closing(tokens):  # type: ignore[type-var]
        yield from decode_growing(tokenizer, _before_stop(tokens, stops))


def _before_stop(tokens: Iterable[int], stops: frozenset[int]) -> Iterator[int]:
    for index in tokens:
        if index in stops:
            return
        yield index


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


class _TokenStreamer(TextIteratorStreamer):
    """Transformers' streamer, handing on ids: its text would hold stop tokens and wait for the end of each word."""

    def __init__(self) -> None:
        super().__init__(cast(Any, None))  # a tokenizer is for text only

    def put(self, value: Tensor) -> None:
        """Queue new tokens; the first call brings the prompt."""
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        for index in value.flatten().tolist():
            self.text_queue.put(index)

    def end(self) -> None:
        """Tell the reader that there are no more."""
        self.text_queue.put(self.stop_signal)

    def fail(self, error: BaseException) -> None:
        """Let the reader have an error in place of the next token."""
        self.text_queue.put(error)


class _StopWhenSet(StoppingCriteria):
    """Ends generation at the next token after an event was set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Answer for each of the B rows of `input_ids` (B, T)."""
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def _greedy_tokens(
    model: Any, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> Iterator[int]:
    streamer = _TokenStreamer()
    abandoned = threading.Event()
    criteria = StoppingCriteriaList([*(model_kwargs.pop("stopping_criteria", None) or ()), _StopWhenSet(abandoned)])
    device = input_ids.device.type
    # Autocast is a thread's own: the new thread gets what rules here.
    autocast = torch.autocast(device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))

    def generate() -> None:
        try:
            with autocast:
                model.generate(
                    input_ids=input_ids,
                    generation_config=config,
                    streamer=streamer,
                    stopping_criteria=criteria,
                    **model_kwargs,
                )
        except BaseException as error:  # whatever it is, the reader is waiting for it
            streamer.fail(error)

    thread = threading.Thread(target=generate, name="greedy answer", daemon=True)
    thread.start()
    try:
        for item in streamer:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        abandoned.set()
        try:
            thread.join()  # nobody else uses the model while the last token is being computed
        except KeyboardInterrupt as again:
            raise StillRunningError from again
