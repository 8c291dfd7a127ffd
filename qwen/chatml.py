r"""ChatML, the prompt format of QWen's chat models.

    <|im_start|>system\n{system}<|im_end|>
    \n<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>      for every earlier turn
    \n<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n

Role, line break and content are tokenised apart, and content never gives a special token: nobody can type one in.
"""

from __future__ import annotations

from collections.abc import Sequence

from .tokenization_qwen import QWenTokenizer

DEFAULT_MAX_WINDOW_SIZE = 6144
"""The most tokens of a prompt, where `generation_config.json` has no `max_window_size`."""

Turn = tuple[str, str]
"""A question and its answer."""


def system_ids(tokenizer: QWenTokenizer, system: str) -> list[int]:
    """Return the token ids of the system block, which opens every prompt, also where the system prompt is empty."""
    header = [tokenizer.im_start_id, *tokenizer.encode_text("system"), *tokenizer.encode_text("\n")]
    return [*header, *tokenizer.encode_text(system), tokenizer.im_end_id]


def question_ids(tokenizer: QWenTokenizer, content_ids: Sequence[int]) -> list[int]:
    r"""Return the token ids of `\n<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n`, before an answer."""
    newline = tokenizer.encode_text("\n")
    user = [tokenizer.im_start_id, *tokenizer.encode_text("user"), *newline, *content_ids, tokenizer.im_end_id]
    assistant = [tokenizer.im_start_id, *tokenizer.encode_text("assistant"), *newline]
    return [*newline, *user, *newline, *assistant]
