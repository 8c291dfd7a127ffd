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
"""An open page that is silent for so long gives up its place."""
KEPT_SECONDS = 600
"""A page without a place finds its conversation again for so long: a phone sleeps, or changes its network. Gradio's
page goes on under the same key then, and does not open its connection again."""


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

    def give_up(self) -> None:
        """End the answer, of which nothing is to be shown any more."""
        self.round += 1
        self.stop()

    def stop(self) -> None:
        """End the answer that is being prepared, waits or runs, if any."""
        self.given_up = True
        if self.job is not None:
            self.job.cancel()


class Visitors:
    """All visitors, by the key of their page."""

    def __init__(self, limits: Limits, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._engine, self._clock = limits, engine, clock
        self._visitors: dict[str, Visitor] = {}
        self._away: dict[str, Visitor] = {}  # they left a conversation; the latest is last
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
            self._free_places()
            if key not in self._visitors:
                if len(self._visitors) >= self._limits.max_visitors:
                    raise Refusal("full", most=self._limits.max_visitors)
                back = self._away.pop(key, None)
                self._visitors[key] = back or Visitor(key, self._clock())
            self._visitors[key].seen = self._clock()
            return self._visitors[key]

    def find(self, key: str) -> Visitor | None:
        """Return a visitor who is there or may come back, or None."""
        return self._visitors.get(key) or self._away.get(key)

    def check_rate(self, visitor: Visitor, address: str) -> None:
        """Count a question of a visitor at an address.

        Raises:
            Refusal: if that is one too many for this minute.
        """
        most = self._limits.questions_per_minute
        page = f"page {visitor.key}"
        for key, budget in ((page, most), (f"address {address}", most * PAGES_PER_ADDRESS)):
            wait = self._limiter.take(key, budget)
            if wait > 0:
                if key != page:
                    self._limiter.give_back(page)
                raise Refusal("too_fast", most=budget, seconds=int(wait) + 1)

    def leave(self, key: str) -> None:
        """Free a visitor's place and the model at once."""
        with self._lock:
            self._connected.discard(key)
            self._part(key)

    def sweep(self) -> None:
        """Forget the conversations of those who have not come back; called now and then."""
        with self._lock:
            self._free_places()
            for visitor in list(self._away.values()):
                if self._clock() - visitor.seen > KEPT_SECONDS:
                    del self._away[visitor.key]

    def _free_places(self) -> None:
        for visitor in list(self._visitors.values()):
            most = LONGEST_SECONDS if visitor.key in self._connected else IDLE_SECONDS
            if not visitor.busy and self._clock() - visitor.seen > most:
                self._part(visitor.key)

    def _part(self, key: str) -> None:
        visitor = self._visitors.pop(key, None)
        if visitor is None:
            return
        visitor.give_up()
        self._engine.forget(key)
        visitor.seen = self._clock()
        if visitor.conversation:
            self._away[key] = visitor
            if len(self._away) > self._limits.max_visitors:
                del self._away[next(iter(self._away))]
