"""Questions and answers to token ids: the one place where a placeholder becomes room for an image's features.

People write one `<|extra_0|>` per image in a question. It becomes `num_image_tokens` copies of that token, between
whatever text stands around it. Training and answering go through the same code, so they cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dataprocess.messages import format_count
from qwen import IGNORE_INDEX
from qwen.chatml import DEFAULT_MAX_WINDOW_SIZE, Turn, build_prompt, question_ids, system_ids
from qwen.tokenization_qwen import IMAGE_TOKEN, QWenTokenizer

SYSTEM_PROMPT = "你是一位图像理解助手。"


class SampleError(ValueError):
    """A sample that cannot be trained on. Once the sample's ID is known, the message names it."""


@dataclass(frozen=True)
class EncodedSample:
    """A training sample as token ids."""

    input_ids: list[int]
    """Prompt, answers and end tokens, at most `max_length` of them."""
    labels: list[int]
    """The same ids where an answer or its end token stands, `IGNORE_INDEX` elsewhere; not shifted."""
    num_cut: int
    """How many tokens of answers, end tokens included, were lost to `max_length`."""


def count_placeholders(text: str) -> int:
    """The number of image placeholders in a question."""
    return text.count(IMAGE_TOKEN)


def with_placeholders(prompt: str, num_images: int) -> str:
    """The prompt, with a placeholder for every image in front if it has none at all.

    Raises:
        ValueError: if it has some, but not as many as there are images.
    """
    found = count_placeholders(prompt)
    if found == 0:
        return IMAGE_TOKEN * num_images + prompt
    if found != num_images:
        raise ValueError(
            f"the prompt has {format_count(found, 'placeholder')} {IMAGE_TOKEN}, but "
            f"{format_count(num_images, 'image is', 'images are')} given; "
            "write one placeholder for each image, or none at all"
        )
    return prompt


def encode_question(tokenizer: QWenTokenizer, question: str, num_image_tokens: int) -> list[int]:
    """Token ids of a question's content.

    Args:
        tokenizer: QWen's tokenizer.
        question: text with a placeholder for every image. Other special tokens in it are plain text.
        num_image_tokens: features per image.

    Returns:
        The ids, with `num_image_tokens` image tokens in every placeholder's place.
    """
    ids: list[int] = []
    for position, part in enumerate(question.split(IMAGE_TOKEN)):
        if position:
            ids.extend([tokenizer.image_token_id] * num_image_tokens)
        ids.extend(tokenizer.encode_text(part))
    return ids


def encode_prompt(
    tokenizer: QWenTokenizer,
    query: str,
    num_image_tokens: int,
    history: Sequence[Turn] | None = None,
    system: str = SYSTEM_PROMPT,
    max_window_size: int = DEFAULT_MAX_WINDOW_SIZE,
) -> tuple[list[int], int]:
    """The prompt whose continuation is the answer to a question.

    Args:
        tokenizer: QWen's tokenizer.
        query: the question, with a placeholder for every image.
        num_image_tokens: features per image.
        history: earlier (question, answer) pairs, oldest first; placeholders in the questions count, in answers not.
        system: the system prompt, in which a placeholder is text.
        max_window_size: in tokens, image tokens included. Oldest turns are dropped beyond it.

    Returns:
        Token ids, and how many of the oldest turns were dropped: their images must be dropped too.

    Raises:
        ValueError: an entry of `history` is not a pair.
    """
    prompt = build_prompt(
        tokenizer,
        query,
        history,
        system,
        max_window_size,
        encode_query=lambda text: encode_question(tokenizer, text, num_image_tokens),
    )
    return prompt.ids, prompt.num_dropped_turns


def encode_sample(
    tokenizer: QWenTokenizer,
    turns: Sequence[Turn],
    num_image_tokens: int,
    system: str = SYSTEM_PROMPT,
    max_length: int = 2048,
) -> EncodedSample:
    """A conversation as input ids and labels.

    Every answer is supervised; all but the last end in `<|im_end|>`, the last in `<|endoftext|>`. What is longer than
    `max_length` loses tokens from the end: of answers, each with its end token, and questions that no token of an
    answer follows any more. Nothing of a question that is kept is lost, and no image token.

    Args:
        tokenizer: QWen's tokenizer.
        turns: (question, answer) pairs, at least one.
        num_image_tokens: features per image.
        system: the system prompt.
        max_length: the most tokens that a sample may have, image tokens included.

    Returns:
        Ids, labels and the number of tokens cut.

    Raises:
        SampleError: there is no turn, an answer is empty, the first question leaves no room for a token of its answer,
            or a question that would be lost has an image.
    """
    if not turns:
        raise SampleError("has no question and answer")
    ids = system_ids(tokenizer, system)
    labels = [IGNORE_INDEX] * len(ids)
    for number, (question, answer) in enumerate(turns, start=1):
        if not answer.strip():
            raise SampleError(f"answer {number} of {len(turns)} is empty")
        prompt = question_ids(tokenizer, encode_question(tokenizer, question, num_image_tokens))
        is_last = number == len(turns)
        response = [*tokenizer.encode_text(answer), tokenizer.eod_id if is_last else tokenizer.im_end_id]
        ids += prompt + response
        labels += [IGNORE_INDEX] * len(prompt) + response
    kept = max_length
    while kept < len(ids) and kept and labels[kept - 1] == IGNORE_INDEX:
        kept -= 1  # a question without an answer behind it
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
