"""web_demo.py as a process of its own, visitors of its page in a browser, and which hosts the browser asked."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from tiny_run import ROOT, environment

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Locator, Page

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
PATIENCE = 240.0
"""Seconds until something that must happen is taken not to; nothing waits so long unless it is broken."""
expect.set_options(timeout=PATIENCE * 1000)
READY = "#conversation .example"
"""It is there once the server has noted the visitor; before, a click may come too early, and an answer be wiped out."""


class Server:
    """The program on a free port; what it writes lies in `folder`, which is its home, temporary and current folder."""

    def __init__(self, folder: Path, *flags: object) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True)
        self._log = folder.with_suffix(".log")
        words = [sys.executable, ROOT / "web_demo.py", "--port", 0, "--device", "cpu", *flags]
        places = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(folder))
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(word) for word in words], cwd=folder, env=environment(**places), stdout=log, stderr=log
            )
        try:
            wait_for(lambda: self.process.poll() is not None or "ready: " in self.log, "web_demo.py to be ready")
            ready = re.search(r"ready: (http://\S+)", self.log)
            assert ready, self.log
            self.url = ready[1]
        except BaseException:
            self.process.kill()
            raise

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def files(self) -> list[Path]:
        """Whatever it has written and not deleted."""
        walk = os.walk(self.folder)  # `rglob` fails if a folder goes away meanwhile
        return [Path(folder, name) for folder, _, names in walk for name in names]

    def stop(self) -> None:
        """Send SIGTERM, upon which it ends quietly."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            assert self.process.wait(PATIENCE) == 143, self.log
        finally:
            self.process.kill()
        assert "Traceback" not in self.log, self.log


class Wire:
    """A way to a server; when it is cut, every connection that goes through it ends."""

    def __init__(self, server: Server) -> None:
        self._server = urlsplit(server.url)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/"
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._connect, daemon=True).start()

    def cut(self) -> None:
        """End what is open; new connections can be made."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _connect(self) -> None:
        while True:
            near, _ = self._listening.accept()
            far = socket.create_connection((self._server.hostname, self._server.port))
            self._ends += near, far
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=pair, daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


class Visitor:
    """A page of the demo in a browser profile of its own."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.context, self.url = context, url
        self.requests: list[str] = []
        self._answers = 0
        self.errors: list[str] = []
        context.set_default_timeout(PATIENCE * 1000)
        context.on("request", lambda request: self.requests.append(request.url))
        context.on("weberror", lambda error: self.errors.append(str(error.error)))
        self.page: Page = context.new_page()
        self.page.goto(url)
        expect(self.part(f"{READY}, input[type=password]").first).to_be_visible()

    def part(self, selector: str) -> Locator:
        return self.page.locator(selector)

    @property
    def question(self) -> Locator:
        return self.part("#question textarea")

    @property
    def send(self) -> Locator:
        return self.part("#question .submit-button")

    @property
    def stop(self) -> Locator:
        return self.part("#question .stop-button")

    @property
    def questions(self) -> Locator:
        return self.part("#conversation .user .message-content")

    @property
    def answers(self) -> Locator:
        return self.part("#conversation [data-testid=bot]")

    @property
    def waiting(self) -> Locator:
        return self.part("#status .waiting")

    @property
    def error(self) -> Locator:
        return self.part("#status .error")

    def attach(self, *pictures: Path) -> None:
        """Give pictures to the next question, as the file dialog does."""
        self.part("#question input[type=file]").first.set_input_files([str(path) for path in pictures])
        expect(self.part("#question .thumbnail-item")).to_have_count(len(pictures))

    def ask(self, text: str, *pictures: Path) -> None:
        """Send a question; do not wait for its answer."""
        if pictures:
            self.attach(*pictures)
        self.question.fill(text)
        expect(self.send).to_be_enabled()
        self._answers = self.answers.count() + 1
        self.send.click()

    def hear(self, answer: str | re.Pattern[str]) -> None:
        """Wait for the answer to what was asked last to be complete and this one."""
        expect(self.answers).to_have_count(self._answers)  # the one before may match too
        expect(self.answers.last).to_have_text(answer)
        expect(self.stop).to_be_hidden()

    def hush(self) -> None:
        """Stop the answer, unless it has ended by itself."""
        self.stop.evaluate_all("buttons => buttons.forEach(button => button.click())")
        expect(self.stop).to_be_hidden()

    def begin_again(self) -> None:
        """Start a new conversation, and wait until it has begun: a question sent before it might be refused as busy."""
        self.part("#clear").click()
        expect(self.questions).to_have_count(0)

    def reload(self) -> None:
        """Load the page anew, as a new visitor, and wait until it is ready."""
        self.page.reload()
        expect(self.part(READY).first).to_be_visible()

    def hear_growing(self) -> int:
        """Wait for an answer that grows; return its length in characters."""
        expect(self.answers.last).to_have_text(re.compile(r"\w"))
        before = len(self.answers.last.inner_text())
        wait_for(lambda: len(self.answers.last.inner_text()) > before, "the answer to grow")
        return len(self.answers.last.inner_text())

    def place(self) -> int:
        """Wait for the position in the queue, and return it."""
        expect(self.waiting).to_have_text(re.compile(r"\d"))
        return int(re.search(r"\d+", self.waiting.inner_text())[0])

    def leave(self) -> None:
        self.context.close()


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Ask again and again until it is so; fail after a long time."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE:.0f} s for {what}"
        time.sleep(0.05)


def hosts(urls: list[str]) -> set[str]:
    """The hosts of addresses; those of `data:` and `blob:` have none."""
    return {urlsplit(url).netloc for url in urls} - {""}


def hosts_in_net_log(file: Path) -> set[str]:
    """The hosts that pages made the browser ask, by its own log; its own errands (updates, accounts) are left out."""
    log = json.loads(file.read_text())
    start = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    requests = [
        event["params"] for event in log["events"] if event["type"] == start and "url" in event.get("params", {})
    ]
    by_pages = [r["url"] for r in requests if r["initiator"] != "not an origin" or r["request_type"] == "main frame"]
    return hosts(by_pages)
