"""A conversation that is longer than the model's window: what stays, and what is left out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from dataprocess.messages import format_count
from dataset.prompt import SYSTEM_PROMPT, encode_prompt, encode_question
from qwen.chatml import DEFAULT_MAX_WINDOW_SIZE, Turn, question_ids, system_ids
from qwen.tokenization_qwen import IMAGE_TOKEN, QWenTokenizer

logger = logging.getLogger(__name__)


def fit_prompt(
    tokenizer: QWenTokenizer,
    query: str,
    num_image_tokens: int,
    history: Sequence[Turn] = (),
    system: str = SYSTEM_PROMPT,
    max_window_size: int = DEFAULT_MAX_WINDOW_SIZE,
    name: str = "",
) -> list[int]:
    """Return the token ids of a prompt that fits into the window, and warn of what was left out.

    System prompt, images and the newest turns stay. The oldest turns are dropped first; their images move to the
    beginning of the oldest question that is left. A question that is too long even alone loses the beginning of its
    text.

    Args:
        tokenizer: QWen's tokenizer.
        query: the question, with a placeholder for every image.
        num_image_tokens: features per image.
        history: earlier (question, answer) pairs, oldest first.
        system: the system prompt.
        max_window_size: the most tokens that the prompt may have, image tokens included.
        name: what the question is called in the warnings.

    Raises:
        ValueError: if system prompt and images leave no room for a question.
    """
    turns, num_dropped = list(history), 0
    while True:
        ids, dropped = encode_prompt(tokenizer, query, num_image_tokens, turns, system, max_window_size)
        if not dropped:
            break
        images = IMAGE_TOKEN * sum(question.count(IMAGE_TOKEN) for question, _ in turns[:dropped])
        turns, num_dropped = turns[dropped:], num_dropped + dropped
        if turns:
            turns[0] = (images + turns[0][0], turns[0][1])
        else:
            query = images + query
    begin = f"{name}: " if name else ""
    too_long = f"longer than the window of {max_window_size} tokens"
    if num_dropped:
        left_out = format_count(num_dropped, "turn was", "turns were")
        logger.warning("%sthe conversation is %s: the oldest %s left out", begin, too_long, left_out)
    excess = len(ids) - max_window_size
    if excess <= 0:
        return ids
    content = encode_question(tokenizer, query, num_image_tokens)
    kept, num_cut = _cut_beginning(tokenizer, content, excess)
    if len(content) - num_cut == content.count(tokenizer.image_token_id):
        raise ValueError(
            f"system prompt and {format_count(query.count(IMAGE_TOKEN), 'image')} leave no room for a question in the "
            f"window of {max_window_size} tokens; shorten the system prompt or give fewer images"
        )
    left_out = format_count(num_cut, "token of its text was", "tokens of its text were")
    logger.warning("%sthe question is %s: the first %s left out", begin, too_long, left_out)
    return [*system_ids(tokenizer, system), *question_ids(tokenizer, kept)]


def _cut_beginning(tokenizer: QWenTokenizer, content: list[int], excess: int) -> tuple[list[int], int]:
    """Drop the first `excess` text tokens, and those that continue a character whose first byte went with them."""
    kept: list[int] = []
    num_cut, cutting = 0, True
    for index in content:
        is_image = index == tokenizer.image_token_id
        if cutting and not is_image:
            token: Any = tokenizer.convert_ids_to_tokens(index)
            cutting = num_cut < excess or 0x80 <= token[0] < 0xC0  # a UTF-8 continuation byte
        if cutting and not is_image:
            num_cut += 1
        else:
            kept.append(index)
    return kept, num_cut
