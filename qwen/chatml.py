r"""ChatML, the prompt format of QWen's chat models.

    <|im_start|>system\n{system}<|im_end|>
    \n<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>      for every earlier turn
    \n<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n

Role, line break and content are tokenised apart, and content never gives a special token: nobody can type one in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .tokenization_qwen import IMEND, IMSTART, QWenTokenizer

DEFAULT_MAX_WINDOW_SIZE = 6144

Turn = tuple[str, str]


@dataclass(frozen=True)
class ChatPrompt:
    """A prompt that ends where the assistant's answer begins."""

    text: str
    ids: list[int]
    num_dropped_turns: int
    """How many of the oldest turns did not fit into the window."""


def message_ids(tokenizer: QWenTokenizer, role: str, content_ids: Sequence[int]) -> list[int]:
    r"""Return the token ids of one closed message: `<|im_start|>{role}\n{content}<|im_end|>`."""
    return [*header_ids(tokenizer, role), *content_ids, tokenizer.im_end_id]


def header_ids(tokenizer: QWenTokenizer, role: str) -> list[int]:
    r"""Return the token ids of `<|im_start|>{role}\n`, after which the content comes."""
    return [tokenizer.im_start_id, *tokenizer.encode_text(role), *tokenizer.encode_text("\n")]


def system_ids(tokenizer: QWenTokenizer, system: str) -> list[int]:
    """Return the token ids of the system block, which opens every prompt, also where the system prompt is empty."""
    return message_ids(tokenizer, "system", tokenizer.encode_text(system))


def question_ids(tokenizer: QWenTokenizer, content_ids: Sequence[int]) -> list[int]:
    r"""Return the token ids of `\n<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n`, before an answer."""
    newline = tokenizer.encode_text("\n")
    user, assistant = message_ids(tokenizer, "user", content_ids), header_ids(tokenizer, "assistant")
    return [*newline, *user, *newline, *assistant]


def build_prompt(
    tokenizer: QWenTokenizer,
    query: str,
    history: Sequence[Turn] | None = None,
    system: str = "",
    max_window_size: int = DEFAULT_MAX_WINDOW_SIZE,
    encode_query: Callable[[str], list[int]] | None = None,
) -> ChatPrompt:
    """Build the prompt for the next answer.

    Args:
        tokenizer: QWen's tokenizer.
        query: the question.
        history: earlier (question, answer) pairs, oldest first. The newest are kept while the whole prompt stays within
            `max_window_size`; from the first that does not fit, all older ones are dropped.
        system: the system prompt.
        max_window_size: in tokens. System prompt and question are kept whatever their length.
        encode_query: turns the content of questions, earlier ones included, into ids; default
            `tokenizer.encode_text`. Answers and the system prompt always go through `encode_text`.

    Returns:
        The prompt's text, ids and the number of turns dropped.

    Raises:
        ValueError: an entry of `history` is not a pair.
    """
    encode = encode_query or tokenizer.encode_text
    head = system_ids(tokenizer, system)
    tail = question_ids(tokenizer, encode(query))
    turns = list(history or ())
    for turn in turns:
        if isinstance(turn, str) or len(turn) != 2:
            raise ValueError(f"history must hold (question, answer) pairs, got {turn!r}")
    kept: list[list[int]] = []
    room = max_window_size - len(head) - len(tail)
    for question, answer in reversed(turns):
        ids = [*question_ids(tokenizer, encode(question)), *tokenizer.encode_text(answer), tokenizer.im_end_id]
        if len(ids) > room:
            break
        room -= len(ids)
        kept.append(ids)
    dropped = len(turns) - len(kept)
    middle = [index for ids in reversed(kept) for index in ids]
    text = f"{IMSTART}system\n{system}{IMEND}"
    for question, answer in turns[dropped:]:
        text += f"\n{IMSTART}user\n{question}{IMEND}\n{IMSTART}assistant\n{answer}{IMEND}"
    text += f"\n{IMSTART}user\n{query}{IMEND}\n{IMSTART}assistant\n"
    return ChatPrompt(text, [*head, *middle, *tail], dropped)


def make_context(
    tokenizer: QWenTokenizer,
    query: str,
    history: Sequence[Turn] | None = None,
    system: str = "",
    max_window_size: int = DEFAULT_MAX_WINDOW_SIZE,
) -> tuple[str, list[int]]:
    """Build the ChatML prompt for a question, as text and as token ids; see `build_prompt` for the arguments.

    No special token is parsed in any content: `<|extra_0|>` is text here too.

    Raises:
        ValueError: an entry of `history` is not a pair.
    """
    prompt = build_prompt(tokenizer, query, history, system, max_window_size)
    return prompt.text, prompt.ids


def stop_token_ids(tokenizer: QWenTokenizer) -> tuple[int, int, int]:
    """Return the ids at which an answer ends: `<|im_end|>`, `<|im_start|>`, `<|endoftext|>`."""
    return tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id


def trim_answer(ids: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    """Return the generated ids before the first stop token, or all of them if there is none."""
    return list(itertools.takewhile(lambda index: index not in stop_ids, ids))
