"""How often a visitor may ask, and how many visitors there may be."""

from __future__ import annotations

import pytest

from model.web.engine import Engine, Job
from model.web.limits import PAGES_PER_ADDRESS, Limits, RateLimiter
from model.web.visitors import IDLE_SECONDS, KEPT_SECONDS, LONGEST_SECONDS, Visitors
from model.web.words import Refusal


class Clock:
    """Time that passes when a test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def visitors(clock):
    engine = Engine()
    yield Visitors(Limits(max_visitors=3, questions_per_minute=2), engine, clock)
    engine.close()


def test_events_of_the_last_minute_count(clock):
    limiter = RateLimiter(clock)
    assert limiter.take("a", 2) == 0
    clock.now += 10
    assert limiter.take("a", 2) == 0
    assert limiter.take("a", 2) == pytest.approx(50)
    assert limiter.take("b", 2) == 0
    clock.now += 50
    assert limiter.take("a", 2) == 0, "the first one is a minute old"
    assert limiter.take("a", 2) == pytest.approx(10)


def test_what_is_refused_or_given_back_is_not_counted(clock):
    limiter = RateLimiter(clock)
    assert limiter.take("a", 1) == 0
    for _ in range(10):
        assert limiter.take("a", 1) > 0
    assert limiter.take("a", 2) == 0
    limiter.give_back("a")
    assert limiter.take("a", 2) == 0
    assert limiter.take("a", 2) > 0
    limiter.give_back("nobody")


def test_the_limiter_forgets_who_has_gone(clock):
    limiter = RateLimiter(clock)
    for number in range(100):
        limiter.take(str(number), 1)
    clock.now += 61
    limiter.take("new", 1)
    assert len(limiter._times) == 1


def test_more_pages_do_not_make_more_questions_than_an_address_has(visitors):
    def ask(number: int) -> None:  # a program that makes up a new page each time
        visitor = visitors.enter(str(number))
        try:
            visitors.check_rate(visitor, "10.0.0.1")
        finally:
            visitors.leave(visitor.key)

    for number in range(2 * PAGES_PER_ADDRESS):
        ask(number)
    with pytest.raises(Refusal) as refusal:
        ask(-1)
    assert refusal.value.key == "too_fast"
    assert refusal.value.values["most"] == 2 * PAGES_PER_ADDRESS
    elsewhere = visitors.enter("elsewhere")
    for number in range(2):  # what the address was refused was not counted for the page
        with pytest.raises(Refusal):
            visitors.check_rate(elsewhere, "10.0.0.1")
        visitors.check_rate(elsewhere, f"10.0.0.{2 + number}")
    with pytest.raises(Refusal) as refusal:
        visitors.check_rate(elsewhere, "10.0.0.4")
    assert refusal.value.values["most"] == 2


def test_places_are_limited_and_free_again_when_somebody_leaves(visitors):
    for key in "abc":
        visitors.connect(key)
        visitors.enter(key)
    with pytest.raises(Refusal) as refusal:
        visitors.enter("d")
    assert refusal.value.key == "full"
    assert visitors.enter("a").key == "a", "who is in stays in"
    visitors.leave("b")
    visitors.enter("d")


@pytest.mark.parametrize(("is_open", "seconds"), [(False, IDLE_SECONDS), (True, LONGEST_SECONDS)])
def test_an_idle_place_is_free_again(visitors, clock, is_open, seconds):
    for key in "abc":
        if is_open:
            visitors.connect(key)
        visitors.enter(key)
    clock.now += seconds
    with pytest.raises(Refusal):
        visitors.enter("d")
    clock.now += 1
    visitors.enter("a").busy = True
    visitors.enter("d")
    assert visitors.find("a") is not None
    assert visitors.find("b") is None


def test_leaving_ends_the_answer_and_frees_the_place(visitors):
    visitor = visitors.enter("a")
    visitor.job = Job("a", lambda cache: iter(()))
    visitors.leave("a")
    assert visitor.job.cancelled
    assert visitor.round == 1
    assert len(visitors) == 0
    assert visitors.enter("a") is not visitor
    visitors.leave("nobody")


@pytest.mark.parametrize("leave", [True, False], ids=["connection lost", "idle without a connection"])
def test_who_comes_back_finds_the_conversation_for_a_while(visitors, clock, leave):
    def go_away() -> None:
        if leave:
            visitors.leave("a")
        else:
            clock.now += IDLE_SECONDS + 1
        visitors.sweep()
        assert len(visitors) == 0

    visitors.enter("a").conversation = ["something"]
    go_away()
    clock.now += KEPT_SECONDS
    visitors.sweep()
    assert visitors.enter("a").conversation == ["something"]
    go_away()
    clock.now += KEPT_SECONDS + 1
    visitors.sweep()
    assert visitors.enter("a").conversation == []


def test_of_those_who_have_left_the_latest_are_kept(visitors):
    for number in range(10):
        visitors.enter(str(number)).conversation = ["something"]
        visitors.leave(str(number))
    kept = []
    for number in range(10):
        kept.append(bool(visitors.enter(str(number)).conversation))
        visitors.leave(str(number))
    assert kept == [False] * 7 + [True] * 3
