"""Answers to ready-made prompts of one row, whole or token by token.

A sampled stream is drawn by transformers_stream_generator, a greedy one comes from transformers' own streamer; both
give the tokens that `generate` gives under the same seed (`torch.manual_seed` before the first token is taken).
"""

from __future__ import annotations

import codecs
import contextlib
import copy
import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation import utils as generation_utils

from .chatml import stop_token_ids, trim_answer
from .tokenization_qwen import QWenTokenizer

DEFAULT_MAX_NEW_TOKENS = 512
"""Length limit of an answer where neither caller nor `generation_config.json` sets one: the published chat models'."""


def answer_ids(
    model: Any,
    tokenizer: QWenTokenizer,
    input_ids: Tensor,
    generation_config: GenerationConfig | None = None,
    **kwargs: Any,
) -> str:
    """Answer a prompt.

    Args:
        model: a model with `generate`, or one wrapped by PEFT.
        tokenizer: QWen's tokenizer.
        input_ids: (1, T), a prompt that ends where the answer begins.
        generation_config: what it leaves open is taken from the model's own; by default that one alone.
        kwargs: generation settings, which come first (`max_new_tokens=…`), and model inputs (`image_features=…`).

    Returns:
        The text of every token generated before the first stop token: `<|im_end|>`, `<|im_start|>`,
        `<|endoftext|>` and the configuration's own `eos_token_id`, or those of `eos_token_id` alone where it is given.

    Raises:
        ValueError: if `input_ids` is not one row, or several answers are asked for.
    """
    input_ids, config, model_kwargs = _prepare(model, tokenizer, input_ids, generation_config, kwargs)
    output = model.generate(input_ids=input_ids, generation_config=config, **model_kwargs)
    new_ids = output[0, input_ids.shape[1] :].tolist()
    return str(tokenizer.decode(trim_answer(new_ids, config.eos_token_id)))


def stream_ids(
    model: Any,
    tokenizer: QWenTokenizer,
    input_ids: Tensor,
    generation_config: GenerationConfig | None = None,
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
    tokens = (_sampled_tokens if config.do_sample else _greedy_tokens)(model, input_ids, config, model_kwargs)
    return _growing_text(tokenizer, tokens, frozenset(config.eos_token_id))


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


def _prepare(
    model: Any,
    tokenizer: QWenTokenizer,
    input_ids: Tensor,
    generation_config: GenerationConfig | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, GenerationConfig, dict[str, Any]]:
    """Check the prompt and settle everything that `generate` would otherwise guess."""
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected one prompt: (1, T) with T at least 1")
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


# ---- Greedy: transformers' streamer, fed by a thread


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
        thread.join()  # nobody else uses the model while the last token is being computed


# ---- Sampling: transformers_stream_generator's loop


def _sampled_tokens(
    model: Any, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> Iterator[int]:
    # `generate` prepares masks, cache, logits processors and stopping criteria, and leaves the loop to the callable.
    tokens = model.generate(
        input_ids=input_ids, generation_config=config, custom_generate=_run_sampling_loop, **model_kwargs
    )
    for token in tokens:
        yield int(token)


def _run_sampling_loop(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Iterator[Tensor]:
    """Draw token after token (1,), as a decoding method that `generate` calls.

    The library's `generate` is left out, as it reseeds the global generators and knows an older transformers only.
    """
    loop = _library_sampling_loop()
    return loop(
        _LoopModel(model),
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        **model_kwargs,
    )


class _LoopModel:
    """Plays the model (`self`) for the library's loop, which was written for an older transformers."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config
        # Without stop ids: the stopping criteria know them, and the loop multiplies tokens if there are several.
        self.generation_config = GenerationConfig()
        self.is_prefill = True

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Tell the model what is new: all that the cache does not hold at first, then one token at a time."""
        is_prefill, self.is_prefill = self.is_prefill, False
        cache = kwargs.get("past_key_values")
        num_new = None
        if cache is not None and kwargs.get("use_cache", True):
            num_new = input_ids.shape[1] - cache.get_seq_length() if is_prefill else 1
        return self.model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=num_new, is_first_iteration=is_prefill, **kwargs
        )

    def __call__(self, **inputs: Any) -> Any:
        """Run the model; logits come in fp32, in which `generate` samples too."""
        output = self.model(**inputs)
        output.logits = output.logits.float()
        return output

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.model._update_model_kwargs_for_generation(*args, **kwargs)


@functools.cache
def _library_sampling_loop() -> Callable[..., Iterator[Tensor]]:
    with _names_that_transformers_dropped():
        from transformers_stream_generator.main import NewGenerationMixin
    return NewGenerationMixin.sample_stream


@contextlib.contextmanager
def _names_that_transformers_dropped() -> Iterator[None]:
    """Supply, for as long as the import takes, what the library imports and sampling one row never uses."""
    # Looked up now: transformers may replace its own module object when it imports a part of itself.
    transformers = sys.modules["transformers"]
    wanted = [(transformers, name) for name in ("BeamSearchScorer", "ConstrainedBeamSearchScorer")]
    wanted += [(transformers, name) for name in ("DisjunctiveConstraint", "PhrasalConstraint")]
    wanted += [(generation_utils, name) for name in ("SampleOutput", "GenerateOutput")]
    missing = [(module, name) for module, name in wanted if not hasattr(module, name)]
    for module, name in missing:
        setattr(module, name, type(name, (), {}))
    try:
        yield
    finally:
        for module, name in missing:
            delattr(module, name)
