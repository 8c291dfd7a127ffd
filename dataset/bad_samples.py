"""Samples that can't be trained on: counted, listed, and too many of them an error."""

from __future__ import annotations

import logging

import torch

from dataprocess.messages import format_count

logger = logging.getLogger(__name__)


class TooManyBadSamplesError(ValueError):
    """More of a data set is bad than `--max_bad_fraction` allows."""


class BadSamples:
    """Which samples of a data set turned out bad; data workers and the main process share it.

    Args:
        num_samples: samples that can be asked for.
        unreadable: messages of those that the two files already showed to be bad.
        max_fraction: the share of all samples that may be bad, 0 to 1.
    """

    def __init__(self, num_samples: int, unreadable: list[str], max_fraction: float) -> None:
        self.flags = torch.zeros(num_samples, dtype=torch.uint8).share_memory_()
        """(num_samples,) 1 where a sample is bad. In shared memory."""
        self.unreadable = unreadable
        self.max_fraction = max_fraction

    def mark(self, index: int) -> None:
        """Remember that a sample is bad."""
        self.flags[index] = 1

    def __len__(self) -> int:
        return int(self.flags.sum()) + len(self.unreadable)

    @property
    def indices(self) -> list[int]:
        """Positions of the bad samples in the data set."""
        return self.flags.nonzero().flatten().tolist()

    def check(self, where: str | None) -> None:
        """Hold the count against what is allowed.

        Args:
            where: the file that lists them; None: there is none, and the first that is unreadable is named.

        Raises:
            TooManyBadSamplesError: if there are more.
        """
        total = len(self.flags) + len(self.unreadable)
        if len(self) > self.max_fraction * total:
            verb = "is" if len(self) == 1 else "are"
            which = f"the first: {self.unreadable[0]}" if where is None else f"{where} lists them"
            raise TooManyBadSamplesError(
                f"{len(self):,} of {format_count(total, 'sample')} {verb} bad, more than --max_bad_fraction "
                f"{self.max_fraction:g} allows; {which}; "
                "mend the data (or --max_length, if it is too small), or raise the fraction"
            )
