"""The order of an epoch's samples: a pure function of seed and epoch.

Trainer's own samplers cannot be resumed in mid-epoch with other batches.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


def epoch_permutation(num_samples: int, seed: int, epoch: int, what: str = "order") -> Tensor:
    """Shuffle 0 … num_samples - 1, (num_samples,) int64, the same way whenever the other arguments are the same."""
    digest = hashlib.blake2b(f"{what}/{seed}/{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randperm(num_samples, generator=generator)


class EpochOrder(Dataset[dict[str, Any]]):
    """A view of a data set in the order of the current epoch, to be read one after the other.

    With a sequential sampler, any number of processes, batch size and accumulation cuts the same order into steps, and
    a position in an epoch is one number: how many samples were given.

    Args:
        dataset: has `set_epoch`, as `ImageCaptionDataset` has.
        seed: the run's seed.
        shuffled: False keeps the order of the data set.
    """

    def __init__(self, dataset: Any, seed: int, *, shuffled: bool = True) -> None:
        self.dataset = dataset
        self.seed = seed
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
        num_samples = len(self.dataset)
        return epoch_permutation(num_samples, self.seed, epoch) if self.shuffled else torch.arange(num_samples)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, before iterating over it."""
        self._epoch.fill_(epoch)
        self.dataset.set_epoch(epoch)
