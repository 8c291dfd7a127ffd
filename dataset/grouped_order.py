"""The order of `--train_sampling_strategy group_by_length`: samples of similar length next to each other.

Trainer's own grouping reads every sample first; here lengths are estimated, and no image is opened.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .epoch_order import EpochOrder, epoch_permutation
from .image_caption_dataset import ImageCaptionDataset
from .prompt import SampleError, encode_sample

BLOCK = 128
"""Samples of similar length that follow each other in a grouped order: a step of all processes should not take more. A
data set of fewer than 8 such blocks has smaller ones."""
_MOST_BLOCKS = 64
"""Blocks of one group. Only the samples of a group are sorted by length, so grouping stays random: each epoch puts
other samples into a batch."""
MOST_COUNTED = 2000
"""Samples that are tokenised to describe a data set: a second or two."""
_BYTES_PER_TOKEN = 4
"""Bytes of UTF-8 in one of Qwen's tokens, about; in English as in Chinese."""


class GroupedOrder(EpochOrder):
    """A data set in which samples of similar length, (samples,) as `estimated_lengths` gives it, follow each other."""

    def __init__(self, dataset: Any, seed: int, lengths: Tensor) -> None:
        super().__init__(dataset, seed)
        self.lengths = lengths

    def permutation(self, epoch: int) -> Tensor:
        """Return the whole order of an epoch, (samples,) int64."""
        return grouped_permutation(self.lengths, self.seed, epoch)


def grouped_permutation(lengths: Tensor, seed: int, epoch: int) -> Tensor:
    """Shuffle samples so that those of similar length follow each other, the same way for the same arguments.

    The shuffled samples are sorted by length in large groups, cut into blocks of `BLOCK`, and the blocks are shuffled.
    The longest sample of all is in the first block: if memory does not suffice, that shows at once. Batch size,
    accumulation and the number of processes play no part, so a run may be resumed with others.

    Args:
        lengths: (samples,) in any unit; estimates will do.
        seed: the run's seed.
        epoch: counted from 0.
    """
    shuffled = epoch_permutation(len(lengths), seed, epoch)  # (samples,)
    block = max(1, min(BLOCK, len(lengths) // 8))
    whole = len(lengths) - len(lengths) % block
    body, rest = shuffled[:whole], shuffled[whole:]
    rest = rest[lengths[rest].argsort(stable=True)]
    group = block * min(max(whole // block // 4, 1), _MOST_BLOCKS)  # a quarter of a small set
    by_length = lengths[body].argsort(stable=True)  # positions in body, shortest first
    by_group = by_length.div(group, rounding_mode="floor").argsort(stable=True)  # still sorted inside each group
    blocks = body[by_length[by_group]].view(-1, block)  # (blocks, block)
    blocks = blocks[epoch_permutation(len(blocks), seed, epoch, "blocks")]
    first = int(lengths[blocks].amax(dim=1).argmax())
    order = torch.cat((blocks[first:].flatten(), blocks[:first].flatten(), rest))  # (samples,)
    if lengths[order[-1]] > lengths[order[block - 1]]:  # the longest of the rest, and of the first block
        order[[block - 1, -1]] = order[[-1, block - 1]]
    return order


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
    grouped, ungrouped = GroupedOrder(dataset, seed, lengths), EpochOrder(dataset, seed)
    return _padding_share(grouped, rows), _padding_share(ungrouped, rows)


def _padding_share(order: EpochOrder, rows: int) -> float:
    dataset, order_of_all = order.dataset, order.permutation(0)  # (samples,)
    padded, tokens, rows = 0, 0, min(rows, len(order_of_all))
    for number in draw_some(-(-len(order_of_all) // rows), max(MOST_COUNTED // rows, 1), order.seed):
        counts = []
        for index in order_of_all[number * rows : (number + 1) * rows].tolist():
            try:
                counts.append(len(dataset.encode(dataset.annotations[index]).input_ids))
            except SampleError:
                counts.append(1)  # of a bad sample
        padded, tokens = padded + max(counts) * len(counts), tokens + sum(counts)
    return 1 - tokens / padded


def draw_some(number: int, most: int, seed: int) -> Sequence[int]:
    """Draw `most` of 0 … number - 1 without repetition, in ascending order; all of them if there are no more."""
    return range(number) if number <= most else sorted(random.Random(seed).sample(range(number), most))
