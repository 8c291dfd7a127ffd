"""Samples that cannot be trained on, and answers that had to be cut: counted over all data workers."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.utils.data import Dataset

from dataprocess.messages import format_count

logger = logging.getLogger(__name__)


class BadSamples:
    """The samples of a data set that turned out bad, besides those that the two files already showed to be bad."""

    def __init__(self, num_samples: int, unreadable: list[str], max_fraction: float) -> None:
        self.flags = torch.zeros(num_samples, dtype=torch.uint8).share_memory_()
        """(samples,) 1 for a bad one; in shared memory for the data workers."""
        self.messages: dict[int, str] = {}
        """What is wrong with samples, by position, as far as this process knows."""
        self.unreadable = unreadable
        """Messages of those that the two files showed to be bad; they have no position."""
        self.max_fraction = max_fraction
        """The share of all samples that may be bad, 0 to 1."""

    def mark(self, index: int, message: str = "") -> None:
        """Remember that a sample is bad and, if it is known here, why; the first message stays."""
        self.flags[index] = 1
        if message:
            self.messages.setdefault(index, message)

    def __len__(self) -> int:
        return int(self.flags.sum()) + len(self.unreadable)

    @property
    def indices(self) -> list[int]:
        """Positions of the bad samples in the data set."""
        return self.flags.nonzero().flatten().tolist()

    def all_messages(self, dataset: Dataset[Any]) -> list[str]:
        """Return what is wrong with each bad sample of the data set; each message names its sample."""
        indices = self.indices  # once: a data worker may mark another sample at any moment
        for index in indices:
            if index not in self.messages:  # marked by a data worker, another process, or before resuming
                sample = dataset[index]  # is marked, with its message, if it is still bad
                self.mark(index, f"sample {sample['id']}: could not be read, but can be now")
        return [*self.unreadable, *(self.messages[index] for index in indices)]


class CutAnswers:
    """Counts the answers of a data set that had to be cut at `max_length`, over all epochs."""

    def __init__(self, num_samples: int, max_length: int, name: str) -> None:
        self.max_length = max_length
        self.name = name
        self.counts = torch.zeros(num_samples, 2, dtype=torch.int32).share_memory_()
        """(samples, 2) how often, and tokens lost; shared with the data workers, of which each has rows of its own."""
        self._logged = 0

    def log(self) -> None:
        """Log the totals if they have grown since the last call."""
        times, tokens = self.counts.sum(dim=0).tolist()
        if times > self._logged:
            said = "%s: %s, an answer was cut at %d tokens; %s lost so far"
            logger.warning(said, self.name, format_count(times, "time"), self.max_length, format_count(tokens, "token"))
            self._logged = times
