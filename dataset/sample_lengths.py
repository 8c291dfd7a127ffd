"""Tokens of samples without opening an image: estimates for grouping by length, and the padding that it saves."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from .epoch_order import EpochOrder
from .image_caption_dataset import ImageCaptionDataset
from .prompt import SampleError, encode_sample

MOST_COUNTED = 2000
"""Samples that are tokenised to describe a data set: a second or two."""
_BYTES_PER_TOKEN = 4
"""Bytes of UTF-8 in one of Qwen's tokens, about; in English as in Chinese."""


def estimated_lengths(dataset: ImageCaptionDataset) -> Tensor:
    """Estimate how many tokens each sample has, (samples,) int32; nothing is tokenised and no image is opened.

    Of alternative answers, the mean counts: the order of all epochs follows from these lengths.
    """
    one, two = (
        len(encode_sample(dataset.tokenizer, [("a", "a")] * turns, 0, dataset.system).input_ids) for turns in (1, 2)
    )
    per_turn = two - one  # the control tokens around question and answer
    lengths = torch.empty(len(dataset), dtype=torch.int32)  # (samples,)
    for index, sample in enumerate(dataset.annotations):
        num_bytes = 0.0
        for question, answers in sample.turns:
            num_bytes += len(question.encode("utf-8", "surrogatepass"))
            num_bytes += len("".join(answers).encode("utf-8", "surrogatepass")) / len(answers)
        tokens = one + (len(sample.turns) - 1) * per_turn + int(num_bytes / _BYTES_PER_TOKEN)
        tokens += len(sample.image_files) * dataset.num_image_tokens
        lengths[index] = min(tokens, dataset.max_length)
    return lengths


def padding_shares(dataset: ImageCaptionDataset, lengths: Tensor, rows: int, seed: int) -> tuple[float, float]:
    """Return the shares of tokens that are padding, 0 to 1: grouped by length, and in random order.

    Samples are grouped by estimated lengths; the padding of batches drawn from the first epoch is counted exactly.

    Args:
        dataset: the samples.
        lengths: (samples,) as `estimated_lengths` gives them.
        rows: samples of a batch.
        seed: of both orders.
    """
    grouped, ungrouped = (
        _padding_share(dataset, EpochOrder(dataset, seed, group_by).permutation(0).split(rows), seed)
        for group_by in (lengths, None)
    )
    return grouped, ungrouped


def _padding_share(dataset: ImageCaptionDataset, batches: Sequence[Tensor], seed: int) -> float:
    padded, tokens = 0, 0
    for number in draw_some(len(batches), max(MOST_COUNTED // len(batches[0]), 1), seed):
        counts = [_num_tokens(dataset, index) for index in batches[number].tolist()]
        padded, tokens = padded + max(counts) * len(counts), tokens + sum(counts)
    return 1 - tokens / padded


def _num_tokens(dataset: ImageCaptionDataset, index: int) -> int:
    try:
        return len(dataset.encode(dataset.annotations[index]).input_ids)
    except SampleError:
        return 1  # of a bad sample


def draw_some(number: int, most: int, seed: int) -> Sequence[int]:
    """Draw `most` of 0 … number - 1 without repetition, in ascending order; all of them if there are no more."""
    return range(number) if number <= most else sorted(random.Random(seed).sample(range(number), most))
