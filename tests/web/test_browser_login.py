"""A page for those who know a password, and how often they may ask."""

from __future__ import annotations

import re

import pytest
from web_page import READY, Server, expect

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.web]


@pytest.fixture(scope="module")
def server(told, tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    (folder / "password").write_text("open sesame\n")
    flags = ["--auth", f"ali:{folder / 'password'}", "--questions_per_minute", 2]
    started = Server(folder / "disk", "--model_weights", told, *flags)
    yield started
    started.stop()


def log_in(visitor, password: str) -> None:
    visitor.part("input[type=text], input:not([type])").first.fill("ali")
    visitor.part("input[type=password]").fill(password)
    visitor.part("button").first.click()


def test_the_password_is_asked_for_and_questions_are_counted(server, visit):
    visitor = visit(server)
    expect(visitor.part("input[type=password]")).to_be_visible()
    expect(visitor.question).to_have_count(0)
    with visitor.page.expect_response("**/login*") as answer:
        log_in(visitor, "open barley")
    assert answer.value.status == 400
    expect(visitor.question).to_have_count(0)
    log_in(visitor, "open sesame")
    expect(visitor.part(READY).first).to_be_visible()
    for _ in range(2):
        visitor.ask("Hello")
        visitor.hear(re.compile(r"\w"))
    visitor.ask("Hello")
    expect(visitor.error).to_contain_text("2")
    expect(visitor.answers).to_have_count(2)
