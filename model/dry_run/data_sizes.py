"""How many tokens the samples and the batches of a data set have; no image is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dataset.annotations import Annotations
from dataset.epoch_order import order_of
from dataset.prompt import SYSTEM_PROMPT, SampleError, encode_sample
from dataset.sample_sizes import MOST_COUNTED, drawn, estimated_lengths, padding_shares
from qwen import IGNORE_INDEX, QWenTokenizer

_LONGEST_BATCHES = 64
"""Batches that are counted exactly, of those that are longest by estimate: which one is longest, no estimate tells."""


@dataclass(frozen=True)
class SampleSize:
    """A sample as training sees it; or a batch: the tokens of its longest sample, and sums of the rest."""

    tokens: int
    """All of them: prompt, image tokens and answers, after cutting."""
    supervised: int
    """Tokens of answers and their end tokens."""
    images: int
    """Images."""


@dataclass(frozen=True)
class DataSizes:
    """What matters of a data set for the length and the memory of a run."""

    samples: list[list[SampleSize]]
    """Samples drawn from all of them, counted exactly: each with every alternative answer."""
    batches: list[SampleSize]
    """The longest batches of the first epoch, counted exactly: each sample with its longest answers."""
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
    """Measure a data set: estimate all of it, and count exactly what is drawn and what is longest.

    Args:
        annotations: the samples.
        tokenizer: QWen's tokenizer.
        num_image_tokens: the tower's features per image.
        max_length: the most tokens of a sample.
        rows: samples of a batch.
        strategy: the order of an epoch, as `order_of` takes it.
        order_seed: of that order.
        seed: decides which samples are counted, and which alternatives the first epoch draws.
        most: how many samples are counted.

    Raises:
        SampleError: if none of the counted samples fits.
    """
    lengths = estimated_lengths(annotations, tokenizer, num_image_tokens, max_length)
    batches = order_of(strategy, lengths, order_seed, 0).split(rows)
    longest = torch.stack([lengths[batch].max() for batch in batches]).argsort(descending=True, stable=True)

    def sizes_of(indices: Sequence[int]) -> list[list[SampleSize]]:
        found = (_sizes(annotations, index, tokenizer, num_image_tokens, max_length) for index in indices)
        return list(filter(None, found))

    samples = sizes_of(drawn(len(annotations), most, seed))
    of_batches = [sizes_of(batches[number].tolist()) for number in longest[:_LONGEST_BATCHES].tolist()]
    if not samples or not any(of_batches):
        raise SampleError(f"none of {len(annotations)} samples fits into --max_length {max_length}; raise it")
    counting = {"max_length": max_length, "rows": rows, "order_seed": order_seed, "seed": seed, "most": most}
    return DataSizes(
        samples=samples,
        batches=[_batch_size(batch) for batch in of_batches if batch],
        rows=min(rows, len(annotations)),
        lengths=lengths,
        padding=padding_shares(annotations, tokenizer, num_image_tokens, lengths, **counting),
        images=_images_of(annotations),
        num_bad=len(annotations.errors),
    )


def _sizes(
    annotations: Annotations, index: int, tokenizer: QWenTokenizer, num_image_tokens: int, max_length: int
) -> list[SampleSize]:
    """Count a sample with each alternative answer, the longest first; nothing if it does not fit."""
    sample = annotations[index]
    turns = [(question, sorted(answers, key=len, reverse=True)) for question, answers in sample.turns]
    sizes = []
    for number in range(max(len(answers) for _, answers in turns)):
        chosen = [(question, answers[number % len(answers)]) for question, answers in turns]
        try:
            encoded = encode_sample(tokenizer, chosen, num_image_tokens, SYSTEM_PROMPT, max_length)
        except SampleError:
            continue
        supervised = sum(label != IGNORE_INDEX for label in encoded.labels)
        sizes.append(SampleSize(len(encoded.input_ids), supervised, len(sample.image_files)))
    return sizes


def _batch_size(samples: Sequence[Sequence[SampleSize]]) -> SampleSize:
    """Return the size of a batch in which every sample has its longest answers."""
    longest = [max(sizes, key=lambda size: size.tokens) for sizes in samples]
    return SampleSize(
        tokens=max(size.tokens for size in longest),
        supervised=sum(size.supervised for size in longest),
        images=sum(size.images for size in longest),
    )


def _images_of(annotations: Annotations) -> frozenset[tuple[str, str]]:
    samples = (annotations[index] for index in range(len(annotations)))
    return frozenset((sample.image_folder, name) for sample in samples for name in sample.image_files)
