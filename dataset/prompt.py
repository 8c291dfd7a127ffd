r"""Text to token ids, with room for an image's features: the heart of the project's data.

People write one `<|extra_0|>` per image in a question. It becomes `num_image_tokens` copies of that token, between the
text before and after it; the model later puts an image's features in their place. Training and answering share these
functions, so they cannot drift apart.

    <|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n
    {answer}<|endoftext|>

Only the second line, the answer and its end, is supervised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen import IGNORE_INDEX
from qwen.chatml import DEFAULT_MAX_WINDOW_SIZE, SYSTEM_PROMPT, Turn
from qwen.conversation import build_prompt
from qwen.tokenization_qwen import IMAGE_TOKEN, QWenTokenizer

from .chat_template import ChatTokenizer

Tokenizer = QWenTokenizer | ChatTokenizer
"""QWen's, or that of another language model with its chat template; both have the same methods."""


class SampleError(ValueError):
    """A sample that cannot be trained on. Once the sample's ID is known, the message names it."""


@dataclass(frozen=True)
class EncodedSample:
    """A training sample as token ids."""

    input_ids: list[int]
    """T ids of prompt, answers and end tokens; T is at most `max_length`."""
    labels: list[int]
    """T labels: the id itself for tokens of an answer and its end token, `IGNORE_INDEX` for all others; not shifted."""
    num_cut: int
    """Tokens of answers, end tokens included, that were lost to `max_length`."""


def encode_question(tokenizer: Tokenizer, question: str, num_image_tokens: int) -> list[int]:
    """Turn a question into token ids.

    Args:
        tokenizer: of the language model.
        question: text with a placeholder for every image. Other special tokens in it are plain text.
        num_image_tokens: features per image.

    Returns:
        The ids, with `num_image_tokens` image tokens in place of every placeholder.
    """
    ids: list[int] = []
    for position, part in enumerate(question.split(IMAGE_TOKEN)):
        if position > 0:  # a placeholder stood before this part
            ids.extend([tokenizer.image_token_id] * num_image_tokens)
        ids.extend(tokenizer.encode_text(part))
    return ids


def encode_prompt(
    tokenizer: Tokenizer,
    query: str,
    num_image_tokens: int,
    history: Sequence[Turn] | None = None,
    system: str | None = SYSTEM_PROMPT,
    max_window_size: int = DEFAULT_MAX_WINDOW_SIZE,
) -> tuple[list[int], int]:
    """Build the prompt whose continuation is the answer to a question.

    Args:
        tokenizer: of the language model.
        query: the question, with a placeholder for every image.
        num_image_tokens: features per image.
        history: earlier (question, answer) pairs, oldest first. A placeholder in a question is an image, in an answer
            it is text.
        system: the system prompt, in which a placeholder is text too.
        max_window_size: the most tokens of the prompt, image tokens included; the oldest turns are dropped beyond it.

    Returns:
        Token ids, and how many of the oldest turns were dropped: their images must be dropped too.

    Raises:
        ValueError: an entry of `history` is not a pair.
    """

    def encode_query(text: str) -> list[int]:
        return encode_question(tokenizer, text, num_image_tokens)

    return build_prompt(tokenizer, query, history, system, max_window_size, encode_query)


def encode_sample(
    tokenizer: Tokenizer,
    turns: Sequence[Turn],
    num_image_tokens: int,
    system: str | None = SYSTEM_PROMPT,
    max_length: int = 2048,
) -> EncodedSample:
    """Turn a conversation into input ids and labels.

    Every answer is supervised. The last one ends in `<|endoftext|>`, earlier ones in `<|im_end|>`. A sample longer than
    `max_length` loses tokens from its end: those of answers, and questions that are left without any token of their
    answer. A question is kept whole or lost whole, and no image token is ever lost.

    Args:
        tokenizer: of the language model.
        turns: (question, answer) pairs, at least one.
        num_image_tokens: features per image.
        system: the system prompt.
        max_length: the most tokens that a sample may have, image tokens included.

    Returns:
        Ids, labels and the number of answer tokens cut.

    Raises:
        SampleError: there is no turn, an answer is empty, the first question leaves no room for a token of its answer,
            or a question that would be lost has an image.
    """
    if not turns:
        raise SampleError("has no question and answer")
    ids = list(tokenizer.system_ids(system))  # grows to T, as labels do
    labels = [IGNORE_INDEX] * len(ids)
    for number, (question, answer) in enumerate(turns, start=1):
        last = number == len(turns)
        if not answer.strip():
            raise SampleError(f"answer {number} of {len(turns)} is empty")
        content = encode_question(tokenizer, question, num_image_tokens)
        prompt = tokenizer.question_ids(content, first=number == 1, last=last)
        response = [*tokenizer.encode_text(answer), tokenizer.answer_end(last=last)]
        ids += prompt + response
        labels += [IGNORE_INDEX] * len(prompt) + response
    kept = min(max_length, len(ids))
    while kept and labels[kept - 1] == IGNORE_INDEX:
        kept -= 1  # a question without an answer teaches nothing
    if kept == 0:
        first = next(position for position, label in enumerate(labels) if label != IGNORE_INDEX)
        raise SampleError(
            f"{first} tokens come before the first answer, expected fewer than max_length = {max_length}; "
            "shorten the question or raise --max_length"
        )
    if tokenizer.image_token_id in ids[kept:]:
        raise SampleError(
            f"{len(ids)} tokens are more than max_length = {max_length}, and an image is among those to be lost; "
            "shorten the answers before it or raise --max_length"
        )
    num_cut = sum(label != IGNORE_INDEX for label in labels[kept:])
    return EncodedSample(ids[:kept], labels[:kept], num_cut)
