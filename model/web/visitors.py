"""Who is there, and what each one has said."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .engine import Engine, Job
from .limits import PAGES_PER_ADDRESS, Limits, RateLimiter
from .questions import Asked
from .words import Refusal

IDLE_SECONDS = 30
"""A place without an open page (a program's, say) is free again after so long: it must not keep others out."""
LONGEST_SECONDS = 3600
"""A page that is open, and of which nothing is heard for so long, loses its conversation."""


class Visitor:
    """One open page: its conversation, and the question that is being answered."""

    def __init__(self, key: str, now: float) -> None:
        self.key = key
        self.conversation: list[Asked] = []
        self.job: Job | None = None
        self.busy = False
        """From the moment a question is accepted until the model has let go of it."""
        self.given_up = False
        """Whether the visitor wants no more of the answer that keeps `busy`, and may ask the next question."""
        self.round = 0
        """Counts what makes a running answer pointless: a new conversation, leaving."""
        self.seen = now

    def stop(self) -> None:
        """End the answer that is running or waiting, if any."""
        if self.job is not None:
            self.job.cancel()
            self.given_up = True


class Visitors:
    """All visitors, by the key of their page."""

    def __init__(self, limits: Limits, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._engine, self._clock = limits, engine, clock
        self._visitors: dict[str, Visitor] = {}
        self._connected: set[str] = set()
        self._limiter = RateLimiter(clock)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._visitors)

    def connect(self, key: str) -> None:
        """Note that a page is open."""
        with self._lock:
            self._connected.add(key)

    def enter(self, key: str) -> Visitor:
        """Return a visitor, who is new or known.

        Raises:
            Refusal: if all places are taken.
        """
        with self._lock:
            now = self._clock()
            for other in list(self._visitors.values()):
                idle = now - other.seen
                if not other.busy and idle > (LONGEST_SECONDS if other.key in self._connected else IDLE_SECONDS):
                    self._drop(other.key)
            if key not in self._visitors:
                if len(self._visitors) >= self._limits.max_visitors:
                    raise Refusal("full", most=self._limits.max_visitors)
                self._visitors[key] = Visitor(key, now)
            self._visitors[key].seen = now
            return self._visitors[key]

    def find(self, key: str) -> Visitor | None:
        """Return a visitor who is there, or None."""
        return self._visitors.get(key)

    def check_rate(self, visitor: Visitor, address: str) -> None:
        """Count a question of a visitor at an address.

        Raises:
            Refusal: if that is one too many for this minute.
        """
        most = self._limits.questions_per_minute
        wait = self._limiter.take((f"page {visitor.key}", most), (f"address {address}", most * PAGES_PER_ADDRESS))
        if wait > 0:
            raise Refusal("too_fast", most=most, seconds=int(wait) + 1)

    def leave(self, key: str) -> None:
        """Forget a visitor, and free the model at once."""
        with self._lock:
            self._connected.discard(key)
            self._drop(key)

    def _drop(self, key: str) -> None:
        visitor = self._visitors.pop(key, None)
        if visitor is not None:
            visitor.round += 1
            visitor.stop()
            visitor.conversation = []
            self._engine.forget(key)
