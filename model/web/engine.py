"""The one thread that runs the model: answers one question after another, in the order they came."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

from qwen.prompt_cache import PromptCache

from ..errors import is_out_of_memory

logger = logging.getLogger(__name__)

KEPT_CACHES = 4
"""Conversations whose keys and values stay in memory, the latest ones; others are read again from their beginning."""

Answering = Callable[[PromptCache], Iterator[str]]
"""Yields the growing answer, and reads the conversation through a cache."""


class Job:
    """One question on its way. The engine writes; the page's coroutine looks."""

    def __init__(self, visitor: str, answering: Answering) -> None:
        self.visitor, self.answering = visitor, answering
        self.text = ""
        """The answer so far."""
        self.error: BaseException | None = None
        self.started = False
        self.stopped = False
        """Whether it ended because of `cancel`."""
        self.ended = threading.Event()
        self.cancelled = False

    def cancel(self) -> None:
        """Have the answer end before its next token; nothing happens if it has ended."""
        self.cancelled = True


class Engine:
    """Answers jobs in a thread of its own until `close`."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()  # the first one is being answered
        self._caches: OrderedDict[str, PromptCache] = OrderedDict()  # the latest visitor's last
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue."""
        with self._changed:
            if self._closed:
                job.cancel()
                job.ended.set()
                return
            self._jobs.append(job)
            self._changed.notify()

    def ahead(self, job: Job) -> int:
        """Return how many jobs come before this one, the one that is being answered included."""
        with self._changed:
            waiting = [other for other in self._jobs if other is job or not other.cancelled]
            return waiting.index(job) if job in waiting else 0

    def forget(self, visitor: str) -> None:
        """Drop the cache of a conversation."""
        with self._changed:
            self._caches.pop(visitor, None)

    def close(self) -> None:
        """End the running answer and all that wait, and the thread."""
        with self._changed:
            self._closed = True
            for job in self._jobs:
                job.cancel()
            self._changed.notify()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if not self._jobs:
                    return
                job = self._jobs[0]
            try:
                job.stopped = job.cancelled
                if not job.stopped:
                    self._answer(job)
            except BaseException as error:  # told by the page; the next question must not suffer
                job.error = error
                with self._changed:  # what was read may be incomplete, and memory short
                    self._caches.clear() if is_out_of_memory(error) else self._caches.pop(job.visitor, None)
            finally:
                with self._changed:
                    self._jobs.popleft()
                job.ended.set()

    def _answer(self, job: Job) -> None:
        job.started = True
        with self._changed:
            cache = self._caches.pop(job.visitor, None) or PromptCache()
            self._caches[job.visitor] = cache
            while len(self._caches) > KEPT_CACHES:
                self._caches.popitem(last=False)
        with contextlib.closing(job.answering(cache)) as texts:  # type: ignore[type-var]
            for text in texts:
                job.text = text
                if job.cancelled:
                    job.stopped = True
                    return
