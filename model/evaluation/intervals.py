"""95% intervals by bootstrap over questions, and the difference between two sets of answers to the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .metrics import Array, Scored

RESAMPLES = 1000
_QUANTILES = (0.025, 0.975)


def intervals(one: Scored, seed: int) -> dict[str, list[float]]:
    """Return the interval of every value: [2.5%, 97.5%] of its values over resampled questions."""
    (sums,) = _resampled([one], seed)
    return {name: _between(values) for name, values in one.values(sums).items()}


def differences(first: Scored, second: Scored, seed: int) -> dict[str, dict[str, Any]]:
    """Return second - first for every value, with the interval over questions resampled for both alike."""
    before, after = first.total, second.total
    resampled = [one.values(sums) for one, sums in zip((first, second), _resampled([first, second], seed), strict=True)]
    return {
        name: {
            "first": before[name],
            "second": after[name],
            "difference": after[name] - before[name],
            "interval": _between(resampled[1][name] - resampled[0][name]),
        }
        for name in before
    }


def _resampled(scored: Sequence[Scored], seed: int) -> list[Array]:
    """Return the sums of statistics over the same resamples of the questions, (RESAMPLES, S) each."""
    rng, number = np.random.default_rng(seed), len(scored[0].rows)
    drawn = []
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(number, size=number), minlength=number)  # how often each question is drawn
        drawn.append([times @ one.statistics for one in scored])
    return [np.stack(sums) for sums in zip(*drawn, strict=True)]


def _between(values: Array) -> list[float]:
    low, high = np.nanquantile(values, _QUANTILES)  # NaN: a small split of POPE was not drawn
    return [float(low), float(high)]
