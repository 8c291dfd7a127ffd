"""How many tokens samples have, without opening an image."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from qwen import IGNORE_INDEX
from qwen.tokenization_qwen import QWenTokenizer

from .annotations import Annotations
from .prompt import SYSTEM_PROMPT, SampleError, encode_sample


@dataclass(frozen=True)
class SampleSize:
    """One sample as training will see it."""

    tokens: int
    """All of them: prompt, image tokens and answers, after cutting."""
    supervised: int
    """Tokens of answers and their end tokens."""
    images: int
    """Images."""


def sample_sizes(
    annotations: Annotations, tokenizer: QWenTokenizer, num_image_tokens: int, max_length: int, most: int, seed: int
) -> list[SampleSize]:
    """Count the tokens of samples with their first alternative answers; those that can't be used are left out.

    Args:
        annotations: the samples.
        tokenizer: QWen's tokenizer.
        num_image_tokens: the tower's features per image.
        max_length: the most tokens of a sample.
        most: where there are more samples than this, so many are drawn.
        seed: decides which.

    Returns:
        Their sizes, in the order of the data.
    """
    indices: Sequence[int] = range(len(annotations))
    if len(annotations) > most:
        indices = sorted(random.Random(seed).sample(indices, most))
    sizes = []
    for index in indices:
        sample = annotations[index]
        turns = [(question, answers[0]) for question, answers in sample.turns]
        try:
            encoded = encode_sample(tokenizer, turns, num_image_tokens, SYSTEM_PROMPT, max_length)
        except SampleError:
            continue
        supervised = sum(label != IGNORE_INDEX for label in encoded.labels)
        sizes.append(SampleSize(len(encoded.input_ids), supervised, len(sample.image_files)))
    return sizes


def drawn_batches(sizes: Sequence[SampleSize], rows: int, seed: int) -> list[SampleSize]:
    """Sizes of batches as an epoch would draw them: every sample once, in random order.

    Args:
        sizes: of the samples.
        rows: samples per batch; the last one may have fewer.
        seed: decides the order.

    Returns:
        For each batch the tokens of its longest sample, and the supervised tokens and images of all of them.
    """
    order = random.Random(seed).sample(list(sizes), len(sizes))
    batches = [order[start : start + rows] for start in range(0, len(order), rows)]
    return [
        SampleSize(max(s.tokens for s in batch), sum(s.supervised for s in batch), sum(s.images for s in batch))
        for batch in batches
    ]
