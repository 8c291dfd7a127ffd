"""How many tokens samples have: estimated without tokenising, to group them, and the padding that grouping saves."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from qwen.tokenization_qwen import QWenTokenizer

from .annotations import Annotations
from .epoch_order import draw_alternative, order_of
from .prompt import SYSTEM_PROMPT, SampleError, encode_sample

_BYTES_PER_TOKEN = 4
MOST_COUNTED = 2000
"""Samples that are tokenised to tell about all: a second or two."""


def estimated_lengths(
    annotations: Annotations,
    tokenizer: QWenTokenizer,
    num_image_tokens: int,
    max_length: int,
    system: str = SYSTEM_PROMPT,
) -> Tensor:
    """Estimate how many tokens each sample has, (samples,) int32; nothing is tokenised and no image is opened.

    A token of Qwen's stands for about 4 bytes of UTF-8, in English as in Chinese. Of alternative answers, the mean
    counts.
    """
    one, two = (len(encode_sample(tokenizer, [("a", "a")] * turns, 0, system).input_ids) for turns in (1, 2))
    per_turn = two - one  # with what stands around question and answer
    lengths = torch.empty(len(annotations), dtype=torch.int32)
    for index in range(len(annotations)):
        sample = annotations[index]
        size = 0.0  # of the text, in bytes
        for question, answers in sample.turns:
            size += len(question.encode("utf-8", "surrogatepass"))
            size += len("".join(answers).encode("utf-8", "surrogatepass")) / len(answers)
        around = one + (len(sample.turns) - 1) * per_turn
        tokens = around + int(size / _BYTES_PER_TOKEN) + len(sample.image_files) * num_image_tokens
        lengths[index] = min(tokens, max_length)
    return lengths


def padding_shares(
    annotations: Annotations,
    tokenizer: QWenTokenizer,
    num_image_tokens: int,
    lengths: Tensor,
    *,
    max_length: int,
    rows: int,
    order_seed: int,
    seed: int,
    most: int = MOST_COUNTED,
) -> tuple[float, float]:
    """Return the share of tokens that are padding, 0 to 1, in the first epoch: grouped by length, and in random order.

    Samples are grouped by estimated lengths; the padding is counted exactly, in batches drawn from all of them.

    Args:
        annotations: the samples.
        tokenizer: QWen's tokenizer.
        num_image_tokens: the tower's features per image.
        lengths: (samples,) as `estimated_lengths` gives them.
        max_length: the most tokens of a sample.
        rows: samples of a batch.
        order_seed: of both orders.
        seed: of the alternative answers that the first epoch draws.
        most: samples that are counted in each order.
    """

    def count(index: int) -> int:
        sample = annotations[index]
        turns = [
            (question, answers[draw_alternative(seed, 0, sample.id, turn, len(answers))])
            for turn, (question, answers) in enumerate(sample.turns)
        ]
        try:
            return len(encode_sample(tokenizer, turns, num_image_tokens, SYSTEM_PROMPT, max_length).input_ids)
        except SampleError:
            return 1  # a bad sample is a single token in its batch

    shares = []
    for strategy in ("group_by_length", "random"):
        batches = order_of(strategy, lengths, order_seed, 0).split(rows)
        padded, tokens = 0, 0
        for number in drawn(len(batches), max(most // rows, 1), order_seed):
            counts = [count(index) for index in batches[number].tolist()]
            padded, tokens = padded + max(counts) * len(counts), tokens + sum(counts)
        shares.append(1 - tokens / padded)
    grouped, ungrouped = shares
    return grouped, ungrouped


def drawn(number: int, most: int, seed: int) -> Sequence[int]:
    """Return the positions 0 to `number` - 1, or, if there are more than `most`, as many drawn from all of them."""
    return range(number) if number <= most else sorted(random.Random(seed).sample(range(number), most))
