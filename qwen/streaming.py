"""Answers while they grow."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from .answering import TokenLoop, check_one_row, complete_settings, new_tokens
from .prompt_cache import PromptCache
from .tokenization_qwen import QWenTokenizer


def stream_ids(
    model: Any,
    tokenizer: Any,
    input_ids: Tensor,
    generation_config: GenerationConfig | None = None,
    *,
    prompt_cache: PromptCache | None = None,
    loop: TokenLoop | None = None,
    **kwargs: Any,
) -> Iterator[str]:
    """Answer a prompt as `answer_ids` does, which see for the arguments, and show the answer while it grows.

    Tokens are drawn, by `decode` or another `loop`, only while the iterator is used: closing it ends the answer.

    Returns:
        An iterator of the whole text so far, longer each time; the last is what `answer_ids` gives.

    Raises:
        ValueError: as for `answer_ids`, and if beams are asked for: their text is not known before the end.
    """
    check_one_row(input_ids)
    config, inputs = complete_settings(model, tokenizer, generation_config, kwargs)
    if (config.num_beams or 1) > 1:
        raise ValueError(f"num_beams is {config.num_beams}: beams can't be streamed; use 1, or ask without streaming")
    tokens = new_tokens(model, input_ids, config, inputs, prompt_cache, loop)
    return decode_growing(tokenizer, itertools.takewhile(lambda token: token not in config.eos_token_id, tokens))


def decode_growing(tokenizer: Any, token_ids: Iterable[int]) -> Iterator[str]:
    """Yield the whole text so far, whenever it has grown, and at the end if nothing was given yet.

    Bytes that may still become a character are held back; the last text is `tokenizer.decode` of all ids.
    """
    if not isinstance(tokenizer, QWenTokenizer):  # its tokens are no bytes
        yield from tokenizer.growing_text(token_ids)
        return
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
