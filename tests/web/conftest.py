"""A trained model, a browser, and visitors whose requests are watched. Each file says `web_tests` of `web_page.py`."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NO_BROWSER = "no Chromium for the tests of web_demo.py: apt-get install chromium fonts-wqy-zenhei"


@pytest.fixture(scope="session")
def chromium(request) -> str:
    """The browser's program. Where there is none, the tests are skipped; with --web that is an error."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        (pytest.fail if request.config.getoption("--web") else pytest.skip)(NO_BROWSER)
    return found


@pytest.fixture(scope="session")
def told(chromium, tmp_path_factory, qwen_tiktoken) -> Path:
    """The run folder of `tiny_trained.py`'s model, and next to it `pictures/`; only where there is a browser."""
    from tiny_trained import train_tiny

    return train_tiny(tmp_path_factory.mktemp("told"), qwen_tiktoken)


@pytest.fixture(scope="session")
def colours(told) -> dict[str, Path]:
    """The pictures it was trained on, by the colour's name."""
    return {path.stem: path for path in (told.parent / "pictures").iterdir()}


@pytest.fixture(scope="module")
def launch(chromium):
    """Start a browser that can reach this machine only. (Playwright's loop must be gone before other tests begin.)"""
    from playwright.sync_api import sync_playwright

    own = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    own += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # a camera that sees green
    with sync_playwright() as playwright:
        yield lambda *words: playwright.chromium.launch(executable_path=chromium, args=[*own, *words])


@pytest.fixture(scope="module")
def browser(launch):
    with contextlib.closing(launch()) as opened:
        yield opened


@pytest.fixture
def visit(browser):
    """Open the page as a new visitor; at the end, nobody has asked another host for anything, and no script failed."""
    from web_page import Visitor, hosts

    visitors = []

    def arrive(server, **profile) -> Visitor:
        visitors.append(Visitor(browser.new_context(**{"locale": "en-GB", **profile}), server.url))
        return visitors[-1]

    yield arrive
    for visitor in visitors:
        visitor.leave()
        assert hosts(visitor.requests) <= hosts([visitor.url])
        assert visitor.errors == []
