"""A conversation that is longer than the model's window: what stays, and what is left out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from dataprocess.messages import format_count
from dataset.prompt import Tokenizer, encode_prompt, encode_question
from qwen.chatml import Turn
from qwen.tokenization_qwen import IMAGE_TOKEN

logger = logging.getLogger(__name__)


def fit_prompt(
    tokenizer: Tokenizer,
    query: str,
    num_image_tokens: int,
    history: Sequence[Turn],
    system: str | None,
    max_window_size: int,
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
    turns = list(history)
    ids, dropped = encode_prompt(tokenizer, query, num_image_tokens, turns, system, max_window_size)
    while dropped:
        images = IMAGE_TOKEN * sum(question.count(IMAGE_TOKEN) for question, _ in turns[:dropped])
        turns = turns[dropped:]
        if turns:
            turns[0] = (images + turns[0][0], turns[0][1])
        else:
            query = images + query
        ids, dropped = encode_prompt(tokenizer, query, num_image_tokens, turns, system, max_window_size)
    begin = f"{name}: " if name else ""
    too_long = f"longer than the window of {max_window_size} tokens"
    if len(turns) < len(history):
        left_out = format_count(len(history) - len(turns), "turn was", "turns were")
        logger.warning("%sthe conversation is %s: the oldest %s left out", begin, too_long, left_out)
    if len(ids) <= max_window_size:
        return ids
    content = encode_question(tokenizer, query, num_image_tokens)
    text = [at for at, index in enumerate(content) if index != tokenizer.image_token_id]
    tokens: Any = tokenizer.convert_ids_to_tokens([content[at] for at in text])
    num_cut = len(ids) - max_window_size
    # A character is cut whole: tokens that begin with a UTF-8 continuation byte go with the one before.
    while num_cut < len(text) and 0x80 <= tokens[num_cut][0] < 0xC0:
        num_cut += 1
    if num_cut >= len(text):
        raise ValueError(
            f"system prompt and {format_count(query.count(IMAGE_TOKEN), 'image')} leave no room for a question in the "
            f"window of {max_window_size} tokens; shorten the system prompt or give fewer images"
        )
    left_out = format_count(num_cut, "token of its text was", "tokens of its text were")
    logger.warning("%sthe question is %s: the first %s left out", begin, too_long, left_out)
    cut = set(text[:num_cut])
    kept = [index for at, index in enumerate(content) if at not in cut]
    return [*tokenizer.system_ids(system), *tokenizer.question_ids(kept)]
