"""What a visitor may ask for at most, and how often."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

MOST_TURNS = 100
"""Questions of one conversation."""
PAGES_PER_ADDRESS = 10
"""So many pages behind one address ask at full speed; a school or an office has one address."""
SAMPLING = {"temperature": (0.05, 2.0), "top_p": (0.05, 1.0), "top_k": (0, 200), "repetition_penalty": (1.0, 2.0)}
"""The least and the most of each setting on the page."""


@dataclass(frozen=True)
class Limits:
    """The flags of web_demo.py that bound what visitors do."""

    max_visitors: int = 20
    """Conversations at the same time."""
    questions_per_minute: int = 10
    """Of one visitor; of one network address, `PAGES_PER_ADDRESS` times as many."""
    max_picture_bytes: int = 20_000_000
    """Of one picture's file; its pixels are limited by the reader of `dataprocess`."""
    max_pictures: int = 8
    """Of one conversation."""
    max_characters: int = 4000
    """Of one question."""
    max_new_tokens: int = 512
    """Of one answer."""


class RateLimiter:
    """Counts events by key over the last minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, period: float = 60.0) -> None:
        self._clock, self._period = clock, period
        self._times: dict[str, deque[float]] = {}
        self._lock = threading.Lock()

    def take(self, key: str, most: int) -> float:
        """Count an event of a key; return 0, or the seconds to wait if there were too many: then it is not counted."""
        with self._lock:
            now = self._clock()
            self._forget(now - self._period)
            times = self._times.setdefault(key, deque())
            if len(times) >= most:
                return times[-most] + self._period - now
            times.append(now)
            return 0.0

    def give_back(self, key: str) -> None:
        """Take back the last event of a key."""
        with self._lock:
            if self._times.get(key):
                self._times[key].pop()

    def _forget(self, before: float) -> None:
        for key, times in list(self._times.items()):
            while times and times[0] <= before:
                times.popleft()
            if not times:
                del self._times[key]
