"""The prompt for the next answer of a conversation: as many of its newest turns as the window has room for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .chatml import DEFAULT_MAX_WINDOW_SIZE, Turn
from .tokenization_qwen import IMEND, IMSTART, QWenTokenizer


def build_prompt(
    tokenizer: Any,
    query: str,
    history: Sequence[Turn] | None = None,
    system: str | None = "",
    max_window_size: int = DEFAULT_MAX_WINDOW_SIZE,
    encode_query: Callable[[str], list[int]] | None = None,
) -> tuple[list[int], int]:
    """Build the prompt for the next answer.

    Args:
        tokenizer: QWen's, or another with the methods of `ChatML`.
        query: the question.
        history: earlier (question, answer) pairs, oldest first. The newest are kept while the whole prompt stays within
            `max_window_size`; from the first that does not fit, all older ones are dropped.
        system: the system prompt.
        max_window_size: in tokens. System prompt and question are kept whatever their length.
        encode_query: turns questions, earlier ones too, into ids; by default `tokenizer.encode_text`.

    Returns:
        The prompt's ids, and how many of the oldest turns were dropped.

    Raises:
        ValueError: an entry of `history` is not a pair.
    """
    encode = encode_query or tokenizer.encode_text
    head, tail = tokenizer.system_ids(system), tokenizer.question_ids(encode(query), first=not history)
    turns = list(history or ())
    for turn in turns:
        if isinstance(turn, str) or len(turn) != 2:
            raise ValueError(f"history must hold (question, answer) pairs, got {turn!r}")
    first = len(turns)  # the oldest turn that fits
    room = max_window_size - len(head) - len(tail)
    while first > 0 and (size := len(_turn_ids(tokenizer, turns[first - 1], encode, first=first == 1))) <= room:
        first, room = first - 1, room - size
    ids = head
    for number, turn in enumerate(turns[first:]):
        ids = ids + _turn_ids(tokenizer, turn, encode, first=number == 0)
    return ids + tokenizer.question_ids(encode(query), first=first == len(turns)), first


def _turn_ids(tokenizer: Any, turn: Turn, encode: Callable[[str], list[int]], *, first: bool) -> list[int]:
    """Return the ids of a question that was answered, and of its answer."""
    question = tokenizer.question_ids(encode(turn[0]), first=first, last=False)
    return [*question, *tokenizer.encode_text(turn[1]), tokenizer.answer_end(last=False)]


def make_context(
    tokenizer: QWenTokenizer,
    query: str,
    history: Sequence[Turn] | None = None,
    system: str = "",
    max_window_size: int = DEFAULT_MAX_WINDOW_SIZE,
) -> tuple[str, list[int]]:
    """Build the ChatML prompt for a question, as text and as token ids; see `build_prompt` for the arguments.

    No special token is parsed in any content: `<|extra_0|>` is text here too.
    """
    ids, num_dropped = build_prompt(tokenizer, query, history, system, max_window_size)
    text = f"{IMSTART}system\n{system}{IMEND}"
    for question, answer in list(history or ())[num_dropped:]:
        text += f"\n{IMSTART}user\n{question}{IMEND}\n{IMSTART}assistant\n{answer}{IMEND}"
    return f"{text}\n{IMSTART}user\n{query}{IMEND}\n{IMSTART}assistant\n", ids
