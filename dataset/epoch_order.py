"""The order in which an epoch goes through a data set: a pure function of seed and epoch."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


def epoch_permutation(num_samples: int, seed: int, epoch: int) -> Tensor:
    """Shuffle 0 … num_samples - 1, the same way whenever seed and epoch are the same.

    Args:
        num_samples: how many there are.
        seed: the run's seed.
        epoch: counted from 0.

    Returns:
        (num_samples,) int64.
    """
    digest = hashlib.blake2b(f"order/{seed}/{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randperm(num_samples, generator=generator)


class EpochOrder(Dataset[dict[str, Any]]):
    """A view of a data set in the order of the current epoch, to be read one after the other.

    With a sequential sampler, every rank count, batch size and accumulation cuts the same order into steps, and a
    position in an epoch is one number: how many samples were given.

    Args:
        dataset: has `set_epoch`, as `ImageCaptionDataset` has.
        seed: the run's seed.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        # Epoch and first position, in shared memory: workers that outlive an epoch see the new ones.
        self._state = torch.zeros(2, dtype=torch.long).share_memory_()
        self._cached: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.dataset) - int(self._state[1])

    def __getitem__(self, position: int) -> dict[str, Any]:
        epoch, start = self._state.tolist()
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, epoch_permutation(len(self.dataset), self.seed, epoch))
        return self.dataset[int(self._cached[1][start + position])]

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
