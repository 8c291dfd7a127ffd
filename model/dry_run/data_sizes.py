"""Tokens and images of a data set's samples and batches, counted without opening an image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from dataset import ImageCaptionDataset
from dataset.annotations import Sample
from dataset.epoch_order import EpochOrder
from dataset.prompt import EncodedSample, SampleError, encode_sample
from dataset.sample_lengths import MOST_COUNTED, draw_some, estimated_lengths, padding_shares
from qwen import IGNORE_INDEX

_LONGEST_BATCHES = 64
"""Batches that are counted exactly, the longest by estimate; an estimate cannot tell which of them is longest."""


@dataclass(frozen=True)
class SampleSize:
    """A sample as training sees it; or a batch: the tokens of its longest sample, and the sums of the others."""

    tokens: int
    """All tokens: prompt, image tokens and answers, after cutting."""
    supervised: int
    """Tokens of answers and their end tokens."""
    images: int
    """Images."""


@dataclass(frozen=True)
class DataSizes:
    """The sizes of a data set that matter to a run."""

    num_samples: int
    """Samples, without those that the two files show to be bad."""
    num_bad: int
    """Samples that the two files show to be bad."""
    samples: list[list[SampleSize]]
    """Samples drawn from all of them, counted exactly, each with every alternative answer."""
    batches: list[SampleSize]
    """The longest batches of the first epoch, counted exactly with the answers drawn for it."""
    rows: int
    """Samples of a batch, if there are so many."""
    padding: tuple[float, float]
    """Shares of padding in batches, 0 to 1: grouped by length, and in random order."""
    images: frozenset[tuple[str, str]]
    """Folder and name of each image, once."""


def data_sizes(
    dataset: ImageCaptionDataset, *, rows: int, strategy: str, order_seed: int, most: int = MOST_COUNTED
) -> DataSizes:
    """Measure a data set: all of it by estimate, some samples and the longest batches exactly.

    Args:
        dataset: the samples.
        rows: samples of a batch.
        strategy: the order of an epoch, as `--train_sampling_strategy` names it.
        order_seed: the seed of that order.
        most: how many samples are counted exactly; the data set's seed decides which.

    Raises:
        SampleError: if none of the samples that were counted fits.
    """
    lengths = estimated_lengths(dataset)
    grouped_by = lengths if strategy == "group_by_length" else None
    order = EpochOrder(dataset, order_seed, grouped_by, shuffled=strategy != "sequential").permutation(0)
    batches = order.split(rows)
    longest = torch.stack([lengths[batch].max() for batch in batches]).argsort(descending=True, stable=True)
    drawn = [dataset.annotations[index] for index in draw_some(len(dataset), most, dataset.seed)]
    samples = [sizes for sample in drawn if (sizes := _sizes_of_alternatives(dataset, sample))]
    counted = [_sizes_in(dataset, batches[number].tolist()) for number in longest[:_LONGEST_BATCHES].tolist()]
    if not samples or not any(counted):
        raise SampleError(f"none of {len(dataset)} samples fits into --max_length {dataset.max_length}; raise it")
    return DataSizes(
        num_samples=len(dataset),
        num_bad=len(dataset.bad),
        samples=samples,
        batches=[batch_size_of(sizes) for sizes in counted if sizes],
        rows=min(rows, len(dataset)),
        padding=padding_shares(dataset, lengths, rows, order_seed),
        images=frozenset((sample.image_folder, name) for sample in dataset.annotations for name in sample.image_files),
    )


def batch_size_of(samples: Sequence[SampleSize]) -> SampleSize:
    """Return a batch's tokens, those of its longest sample, and the supervised tokens and images of all."""
    return SampleSize(
        max(size.tokens for size in samples), sum(size.supervised for size in samples), sum(s.images for s in samples)
    )


def _sizes_in(dataset: ImageCaptionDataset, batch: Iterable[int]) -> list[SampleSize]:
    """Count the samples of a batch with the answers of the data set's epoch; those that do not fit are left out."""
    sizes = []
    for index in batch:
        sample = dataset.annotations[index]
        try:
            sizes.append(_size(sample, dataset.encode(sample)))
        except SampleError:
            continue
    return sizes


def _sizes_of_alternatives(dataset: ImageCaptionDataset, sample: Sample) -> list[SampleSize]:
    """Count a sample with the first alternative of each turn, with the second, and so on, as far as they fit."""
    sizes = []
    for number in range(max(len(answers) for _, answers in sample.turns) if dataset.training else 1):
        turns = [(question, answers[number % len(answers)]) for question, answers in sample.turns]
        try:
            encoded = encode_sample(
                dataset.tokenizer, turns, dataset.num_image_tokens, dataset.system, dataset.max_length
            )
        except SampleError:
            continue
        sizes.append(_size(sample, encoded))
    return sizes


def _size(sample: Sample, encoded: EncodedSample) -> SampleSize:
    supervised = sum(label != IGNORE_INDEX for label in encoded.labels)
    return SampleSize(len(encoded.input_ids), supervised, len(sample.image_files))
