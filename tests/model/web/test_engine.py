"""The thread that runs the model: in order, one at a time, and free as soon as nobody waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from model.web.engine import KEPT_CACHES, Engine, Job

SOON = 20


@pytest.fixture
def engine():
    engine = Engine()
    yield engine
    engine.close()


class Endless:
    """An answer that never ends by itself, and says how far it came."""

    def __init__(self) -> None:
        self.began, self.closed = threading.Event(), threading.Event()

    def __call__(self, cache: object) -> Iterator[str]:
        text = ""
        try:
            while True:
                text += "x"
                yield text
                self.began.set()
        finally:
            self.closed.set()


def instant(*texts: str):
    return lambda cache: iter(texts)


def run(engine: Engine, answering, visitor: str = "a") -> Job:
    job = Job(visitor, answering)
    engine.submit(job)
    return job


def test_answers_come_in_order_and_grow(engine):
    order = []

    def answering(number):
        def say(cache):
            order.append(number)
            yield "a"
            yield "ab"

        return say

    jobs = [run(engine, answering(number)) for number in range(5)]
    assert all(job.ended.wait(SOON) for job in jobs)
    assert order == [0, 1, 2, 3, 4]
    assert [(job.text, job.error, job.stopped) for job in jobs] == [("ab", None, False)] * 5


def test_a_cancelled_answer_ends_by_itself_and_keeps_its_text(engine):
    answering = Endless()
    job = run(engine, answering)
    assert answering.began.wait(SOON)
    after = run(engine, instant("next"), "b")
    assert engine.ahead(after) == 1
    job.cancel()
    assert job.ended.wait(SOON)
    assert answering.closed.is_set(), "the generator was closed, so no token is computed any more"
    assert job.stopped
    assert set(job.text) == {"x"}
    assert after.ended.wait(SOON)
    assert after.text == "next"


def test_who_gives_up_waiting_is_no_longer_ahead_and_never_asked(engine):
    first, asked = Endless(), threading.Event()
    running = run(engine, first)
    waiting = run(engine, lambda cache: asked.set() or iter(()), "b")
    last = run(engine, instant("end"), "c")
    assert engine.ahead(last) == 2
    waiting.cancel()
    assert engine.ahead(last) == 1
    running.cancel()
    assert last.ended.wait(SOON)
    assert waiting.ended.is_set()
    assert waiting.stopped
    assert not asked.is_set()


def test_an_error_is_kept_for_the_page_and_the_next_question_is_answered(engine):
    def fail(cache):
        yield "so far"
        raise RuntimeError("out of memory")

    broken, after = run(engine, fail), run(engine, instant("fine"))
    assert broken.ended.wait(SOON)
    assert str(broken.error) == "out of memory"
    assert broken.text == "so far"
    assert after.ended.wait(SOON)
    assert after.text == "fine"


def test_caches_are_kept_for_the_latest_conversations_only(engine):
    seen = []

    def remember(cache):
        seen.append(cache)
        yield "text"

    def ask(visitor):
        assert run(engine, remember, visitor).ended.wait(SOON)
        return seen[-1]

    first = ask("a")
    assert ask("a") is first, "a follow-up question finds what was read"
    for number in range(KEPT_CACHES - 1):
        ask(str(number))
    assert ask("a") is first
    for number in range(KEPT_CACHES):
        ask(f"later {number}")
    again = ask("a")
    assert again is not first
    engine.forget("a")
    assert ask("a") is not again


def test_memory_that_ran_out_drops_every_cache(engine):
    seen = []

    def remember(cache):
        seen.append(cache)
        yield "text"

    def fail(cache):
        raise MemoryError
        yield

    run(engine, remember, "a")
    run(engine, fail, "b")
    assert run(engine, remember, "a").ended.wait(SOON)
    assert seen[0] is not seen[1]


def test_closing_ends_what_runs_and_what_waits():
    engine = Engine()
    answering = Endless()
    jobs = [run(engine, answering), run(engine, instant("never"))]
    assert answering.began.wait(SOON)
    engine.close()
    assert all(job.ended.is_set() and job.stopped for job in jobs)
    late = run(engine, instant("late"))
    assert late.ended.is_set()
    assert late.text == ""
