"""How many tokens samples and batches have, without opening an image."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen import IGNORE_INDEX
from qwen.tokenization_qwen import QWenTokenizer

from .annotations import Annotations
from .epoch_order import order_of
from .prompt import SYSTEM_PROMPT, SampleError, encode_sample

_BYTES_PER_TOKEN = 4
MOST_COUNTED = 2000
"""Samples that are tokenised to tell about all: a second or two."""
_LONGEST_BATCHES = 64
"""Batches that are counted exactly, of those that are longest by estimate: which one is longest, no estimate tells."""


@dataclass(frozen=True)
class SampleSize:
    """One sample as training will see it; or a batch: its longest sample, and the sums of the others."""

    tokens: int
    """All of them: prompt, image tokens and answers, after cutting."""
    supervised: int
    """Tokens of answers and their end tokens."""
    images: int
    """Images."""


@dataclass(frozen=True)
class DataSizes:
    """What a data set is to a run, as far as sizes go."""

    samples: list[SampleSize]
    """Samples drawn from all of it, counted exactly."""
    batches: list[SampleSize]
    """The longest batches of the first epoch, counted exactly."""
    rows: int
    """Samples of a batch, as far as there are so many."""
    lengths: Tensor
    """(samples,) tokens of every sample, estimated."""
    padding: tuple[float, float]
    """Shares of padding in batches, 0 to 1: grouped by length, and in random order."""
    images: frozenset[tuple[str, str]]
    """Folder and name of every image, once."""
    num_bad: int
    """Samples that the two files show to be bad; they are left out of all of this."""


def data_sizes(
    annotations: Annotations,
    tokenizer: QWenTokenizer,
    num_image_tokens: int,
    *,
    max_length: int,
    rows: int,
    strategy: str,
    order_seed: int,
    seed: int,
    most: int = MOST_COUNTED,
) -> DataSizes:
    """Measure a data set: all of it by estimate, and exactly what is drawn and what is longest.

    Args:
        annotations: the samples.
        tokenizer: QWen's tokenizer.
        num_image_tokens: the tower's features per image.
        max_length: the most tokens of a sample.
        rows: samples of a batch.
        strategy: the order of an epoch, as `order_of` takes it.
        order_seed: of that order.
        seed: decides which samples are counted.
        most: how many of them are.

    Raises:
        SampleError: if none of the samples that were looked at fits.
    """
    lengths = estimated_lengths(annotations, tokenizer, num_image_tokens, max_length)
    batches = order_of(strategy, lengths, order_seed, 0).split(rows)
    longest = torch.stack([lengths[batch].max() for batch in batches]).argsort(descending=True, stable=True)

    def sizes_of(indices: Sequence[int]) -> list[SampleSize]:
        found = (_size(annotations, index, tokenizer, num_image_tokens, max_length) for index in indices)
        return [size for size in found if size is not None]

    samples = sizes_of(_drawn(len(annotations), most, seed))
    of_batches = [sizes_of(batches[index].tolist()) for index in longest[:_LONGEST_BATCHES].tolist()]
    if not samples or not any(of_batches):
        raise SampleError(f"none of {len(annotations)} samples fits into --max_length {max_length}; raise it")
    padding = padding_shares(
        annotations,
        tokenizer,
        num_image_tokens,
        lengths,
        max_length=max_length,
        rows=rows,
        order_seed=order_seed,
        most=most,
    )
    return DataSizes(
        samples,
        [batch_size_of(batch) for batch in of_batches if batch],
        min(rows, len(annotations)),
        lengths,
        padding,
        _images_of(annotations),
        len(annotations.errors),
    )


def padding_shares(
    annotations: Annotations,
    tokenizer: QWenTokenizer,
    num_image_tokens: int,
    lengths: Tensor,
    *,
    max_length: int,
    rows: int,
    order_seed: int,
    most: int = MOST_COUNTED,
) -> tuple[float, float]:
    """The share of tokens that are padding, 0 to 1, in the first epoch: grouped by length, and in random order.

    Samples are grouped by estimated lengths; the padding is counted exactly, in batches drawn from all of them.

    Args:
        annotations: the samples.
        tokenizer: QWen's tokenizer.
        num_image_tokens: the tower's features per image.
        lengths: (samples,) as `estimated_lengths` gives them.
        max_length: the most tokens of a sample.
        rows: samples of a batch.
        order_seed: of both orders.
        most: samples that are counted in each.
    """
    shares = []
    for strategy in ("group_by_length", "random"):
        batches = order_of(strategy, lengths, order_seed, 0).split(rows)
        padded, tokens = 0, 0
        for number in _drawn(len(batches), max(most // rows, 1), order_seed):
            sizes = (_size(annotations, i, tokenizer, num_image_tokens, max_length) for i in batches[number].tolist())
            counts = [1 if size is None else size.tokens for size in sizes]  # a bad sample has one token
            padded, tokens = padded + max(counts) * len(counts), tokens + sum(counts)
        shares.append(1 - tokens / padded)
    grouped, ungrouped = shares
    return grouped, ungrouped


def _images_of(annotations: Annotations) -> frozenset[tuple[str, str]]:
    samples = (annotations[index] for index in range(len(annotations)))
    return frozenset((sample.image_folder, name) for sample in samples for name in sample.image_files)


def _drawn(number: int, most: int, seed: int) -> Sequence[int]:
    return range(number) if number <= most else sorted(random.Random(seed).sample(range(number), most))


def _size(
    annotations: Annotations, index: int, tokenizer: QWenTokenizer, num_image_tokens: int, max_length: int
) -> SampleSize | None:
    """Count one sample; None if it does not fit."""
    sample = annotations[index]
    turns = [(question, answers[0]) for question, answers in sample.turns]
    try:
        encoded = encode_sample(tokenizer, turns, num_image_tokens, SYSTEM_PROMPT, max_length)
    except SampleError:
        return None
    supervised = sum(label != IGNORE_INDEX for label in encoded.labels)
    return SampleSize(len(encoded.input_ids), supervised, len(sample.image_files))


def batch_size_of(samples: Sequence[SampleSize]) -> SampleSize:
    """A batch's tokens are those of its longest sample; supervised tokens and images are those of all."""
    return SampleSize(
        max(s.tokens for s in samples), sum(s.supervised for s in samples), sum(s.images for s in samples)
    )


def estimated_lengths(
    annotations: Annotations,
    tokenizer: QWenTokenizer,
    num_image_tokens: int,
    max_length: int,
    system: str = SYSTEM_PROMPT,
) -> Tensor:
    """About how many tokens each sample has, (samples,) int32; nothing is tokenised and no image is opened.

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
