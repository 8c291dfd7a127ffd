"""The order in which an epoch goes through a data set: a pure function of seed, epoch and, if grouped, lengths."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

BLOCK = 128
"""Samples of similar length that follow each other in a grouped order: a step of all ranks should not take more. A set
of fewer than 8 such blocks has smaller ones."""
_MOST_BLOCKS = 64
"""Blocks of one group. Its samples are drawn at random and sorted together: chance has its say in who meets whom."""


def epoch_permutation(num_samples: int, seed: int, epoch: int, what: str = "order") -> Tensor:
    """Shuffle 0 … num_samples - 1, the same way whenever seed and epoch are the same.

    Args:
        num_samples: how many there are.
        seed: the run's seed.
        epoch: counted from 0.
        what: what is shuffled; another word gives another order.

    Returns:
        (num_samples,) int64.
    """
    digest = hashlib.blake2b(f"{what}/{seed}/{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randperm(num_samples, generator=generator)


def grouped_permutation(lengths: Tensor, seed: int, epoch: int) -> Tensor:
    """Shuffle samples so that those of similar length stand together, the same way for the same arguments.

    The shuffled samples are sorted by length in large groups, cut into blocks of `BLOCK`, and the blocks are shuffled.
    The block with the longest sample comes first: if memory does not suffice, that shows at once. Batch size,
    accumulation and ranks play no part, so a run may go on with others.

    Args:
        lengths: (samples,) of each sample, in any unit; estimates will do.
        seed: the run's seed.
        epoch: counted from 0.

    Returns:
        (samples,) int64.
    """
    shuffled = epoch_permutation(len(lengths), seed, epoch)
    block = max(1, min(BLOCK, len(lengths) // 8))
    whole = len(lengths) - len(lengths) % block
    body, rest = shuffled[:whole], shuffled[whole:]
    rest = rest[lengths[rest].argsort(stable=True)]
    group = block * min(max(whole // block // 4, 1), _MOST_BLOCKS)  # a quarter of a small set
    by_length = lengths[body].argsort(stable=True)
    by_group = by_length.div(group, rounding_mode="floor").argsort(stable=True)
    blocks = body[by_length[by_group]].view(-1, block)
    blocks = blocks[epoch_permutation(len(blocks), seed, epoch, "blocks")]
    first = int(lengths[blocks].amax(dim=1).argmax())
    blocks = torch.cat((blocks[first:], blocks[:first]))
    return torch.cat((blocks.flatten(), rest))


def order_of(strategy: str, lengths: Tensor, seed: int, epoch: int) -> Tensor:
    """The order of an epoch under `--train_sampling_strategy`, (samples,) int64.

    Args:
        strategy: `random`, `group_by_length`, or anything else: as the samples stand.
        lengths: (samples,) of each sample, in any unit.
        seed: the run's seed.
        epoch: counted from 0.
    """
    if strategy == "group_by_length":
        return grouped_permutation(lengths, seed, epoch)
    return epoch_permutation(len(lengths), seed, epoch) if strategy == "random" else torch.arange(len(lengths))


def draw_alternative(seed: int, epoch: int, sample_id: int, turn: int, num_alternatives: int) -> int:
    """Which of a turn's alternative answers is used in an epoch.

    A pure function: it does not depend on the order of samples, on data workers or on any random generator's state.

    Args:
        seed: the run's seed.
        epoch: counted from 0.
        sample_id: the sample's ID.
        turn: the turn's number in the conversation, from 0.
        num_alternatives: how many there are.

    Returns:
        An index below `num_alternatives`, drawn uniformly.
    """
    digest = hashlib.blake2b(f"{seed}/{epoch}/{sample_id}/{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % num_alternatives


class EpochOrder(Dataset[dict[str, Any]]):
    """A view of a data set in the order of the current epoch, to be read one after the other.

    With a sequential sampler, every rank count, batch size and accumulation cuts the same order into steps, and a
    position in an epoch is one number: how many samples were given.

    Args:
        dataset: has `set_epoch`, as `ImageCaptionDataset` has.
        seed: the run's seed.
        lengths: (samples,) by which samples are grouped; None: they are not.
        shuffled: whether samples come in another order than they stand in.
    """

    def __init__(self, dataset: Any, seed: int, lengths: Tensor | None = None, *, shuffled: bool = True) -> None:
        self.dataset = dataset
        self.seed = seed
        self.lengths = lengths
        self.shuffled = shuffled
        # Epoch and first position, in shared memory: workers that outlive an epoch see the new ones.
        self._state = torch.zeros(2, dtype=torch.long).share_memory_()
        self._cached: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.dataset) - int(self._state[1])

    def __getitem__(self, position: int) -> dict[str, Any]:
        epoch, start = self._state.tolist()
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self.permutation(epoch))
        return self.dataset[int(self._cached[1][start + position])]

    def permutation(self, epoch: int) -> Tensor:
        """The whole order of an epoch, (samples,) int64."""
        if not self.shuffled:
            return torch.arange(len(self.dataset))
        if self.lengths is None:
            return epoch_permutation(len(self.dataset), self.seed, epoch)
        return grouped_permutation(self.lengths, self.seed, epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, before iterating over it.

        Args:
            epoch: counted from 0.
        """
        if epoch != int(self._state[0]):  # data loaders say it again, of an epoch that may begin in its middle
            self._state[0], self._state[1] = epoch, 0
        self.dataset.set_epoch(epoch)

    def start_at(self, position: int) -> None:
        """Leave the first samples of the chosen epoch out, for a run that goes on in its middle.

        Args:
            position: how many.
        """
        self._state[1] = position
