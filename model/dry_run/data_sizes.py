"""Tokens and images of a data set's samples and batches, counted without opening an image."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dataset import ImageCaptionDataset
from dataset.annotations import Sample
from dataset.epoch_order import EpochOrder
from dataset.grouped_order import MOST_COUNTED, GroupedOrder, draw_some, estimated_lengths, padding_shares
from dataset.prompt import SampleError, encode_sample
from qwen import IGNORE_INDEX

from .memory_estimate import BatchShape

_LONGEST_BATCHES = 64
"""Batches that are counted exactly, the longest by estimate; an estimate cannot tell which of them is longest."""


@dataclass(frozen=True)
class SampleSize:
    """A sample as training sees it."""

    tokens: int  # prompt, image tokens and answers, after cutting
    supervised: int  # tokens of answers and their end tokens
    images: int


@dataclass(frozen=True)
class DataSizes:
    """The sizes of a data set that matter to a run."""

    num_samples: int  # without those that the two files show to be bad
    num_bad: int  # those
    samples: list[list[SampleSize]]  # drawn from all, counted exactly, each with every alternative answer
    batches: list[BatchShape]  # the longest of the first epoch, counted exactly: each sample with its longest answers
    padding: tuple[float, float]  # shares of padding in batches, 0 to 1: grouped by length, and in random order
    dataset: ImageCaptionDataset  # whose sizes these are


def data_sizes(
    dataset: ImageCaptionDataset, *, rows: int, strategy: str, order_seed: int, most: int = MOST_COUNTED
) -> DataSizes:
    """Measure a data set: all of it by estimate, `most` samples, drawn by its seed, and the longest batches exactly.

    Args:
        dataset: the samples.
        rows: samples of a batch.
        strategy: the order of an epoch, as `--train_sampling_strategy` names it.
        order_seed: the seed of that order.
        most: how many samples are counted exactly.

    Raises:
        SampleError: if none of the samples that were counted fits.
    """
    lengths = estimated_lengths(dataset)
    order = EpochOrder(dataset, order_seed, shuffled=strategy != "sequential")
    if strategy == "group_by_length":
        order = GroupedOrder(dataset, order_seed, lengths)
    every = order.permutation(0)  # (samples,)
    filled = torch.cat((lengths[every], lengths.new_zeros(-len(every) % rows)))  # so that the last batch is whole, too
    longest = filled.view(-1, rows).amax(dim=1).argsort(descending=True, stable=True)[:_LONGEST_BATCHES]
    samples = _sizes_of(dataset, draw_some(len(dataset), most, dataset.seed))
    counted = [_sizes_of(dataset, every[at * rows : (at + 1) * rows].tolist()) for at in longest.tolist()]
    if not samples or not any(counted):
        raise SampleError(f"none of {len(dataset)} samples fits into --max_length {dataset.max_length}; raise it")
    shapes = []
    for batch in filter(None, counted):
        longest_answers = [max(sizes, key=lambda size: size.tokens) for sizes in batch]
        tokens = max(size.tokens for size in longest_answers)
        supervised = sum(size.supervised for size in longest_answers)
        images = sum(size.images for size in longest_answers)
        shapes.append(BatchShape(min(rows, len(dataset)), tokens, supervised, images))
    return DataSizes(
        num_samples=len(dataset),
        num_bad=len(dataset.bad),
        samples=samples,
        batches=shapes,
        padding=padding_shares(dataset, lengths, rows, order_seed),
        dataset=dataset,
    )


def _sizes_of(dataset: ImageCaptionDataset, indices: Iterable[int]) -> list[list[SampleSize]]:
    """Count some samples, leaving out those that do not fit."""
    return list(filter(None, (_sizes(dataset, dataset.annotations[index]) for index in indices)))


def _sizes(dataset: ImageCaptionDataset, sample: Sample) -> list[SampleSize]:
    """Count a sample with each answer that training may draw, the longest of all turns first."""
    turns = [(question, sorted(answers, key=len, reverse=True)) for question, answers in sample.turns]
    if not dataset.training:  # an evaluation takes the first
        turns = [(question, answers[:1]) for question, answers in sample.turns]
    sizes = []
    for number in range(max(len(answers) for _, answers in turns)):
        chosen = [(question, answers[number % len(answers)]) for question, answers in turns]
        how = (dataset.num_image_tokens, dataset.system, dataset.max_length)
        try:
            encoded = encode_sample(dataset.tokenizer, chosen, *how)
        except SampleError:
            continue
        supervised = sum(label != IGNORE_INDEX for label in encoded.labels)
        sizes.append(SampleSize(len(encoded.input_ids), supervised, len(sample.image_files)))
    return sizes
