"""The order of an epoch's samples: a pure function of seed, epoch and, if they are grouped, lengths.

Trainer's own samplers cannot be resumed in mid-epoch with other batches, and its grouping reads every sample first.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

BLOCK = 128
"""Samples of similar length that follow each other in a grouped order: a step of all processes should not take more. A
data set of fewer than 8 such blocks has smaller ones."""
_MOST_BLOCKS = 64
"""Blocks of one group. Only the samples of a group are sorted by length, so grouping stays random: each epoch puts
other samples into a batch."""


def epoch_permutation(num_samples: int, seed: int, epoch: int, what: str = "order") -> Tensor:
    """Shuffle 0 … num_samples - 1, (num_samples,) int64, the same way whenever the other arguments are the same."""
    digest = hashlib.blake2b(f"{what}/{seed}/{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randperm(num_samples, generator=generator)


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


class EpochOrder(Dataset[dict[str, Any]]):
    """A view of a data set in the order of the current epoch, to be read one after the other.

    With a sequential sampler, any number of processes, batch size and accumulation cuts the same order into steps, and
    a position in an epoch is one number: how many samples were given.

    Args:
        dataset: has `set_epoch`, as `ImageCaptionDataset` has.
        seed: the run's seed.
        lengths: (samples,) by which samples are grouped; None: they are not.
        shuffled: False keeps the order of the data set.
    """

    def __init__(self, dataset: Any, seed: int, lengths: Tensor | None = None, *, shuffled: bool = True) -> None:
        self.dataset = dataset
        self.seed = seed
        self.lengths = lengths
        self.shuffled = shuffled
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()  # workers that outlive an epoch see the next
        self._cached: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> dict[str, Any]:
        epoch = int(self._epoch)
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self.permutation(epoch))
        return self.dataset[int(self._cached[1][position])]

    def permutation(self, epoch: int) -> Tensor:
        """Return the whole order of an epoch, (samples,) int64."""
        if not self.shuffled:
            return torch.arange(len(self.dataset))
        if self.lengths is None:
            return epoch_permutation(len(self.dataset), self.seed, epoch)
        return grouped_permutation(self.lengths, self.seed, epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, before iterating over it."""
        self._epoch.fill_(epoch)
        self.dataset.set_epoch(epoch)
