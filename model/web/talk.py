"""One visitor's question from the page to the model and back; nothing here knows Gradio."""

from __future__ import annotations

import asyncio
import html
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..asking.assistant import Assistant
from ..errors import in_one_line, is_out_of_memory
from .engine import Engine, Job
from .examples import Example
from .limits import MOST_TURNS, Limits
from .messages import chat_messages, question_at
from .questions import Asked, Picture, build_prompt, check_settings, stream_answer
from .uploads import UploadFolder, files_of, thumbnail
from .visitors import Visitor, Visitors
from .words import Refusal, say

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.04


@dataclass(frozen=True)
class Who:
    """Who asks: the key of the page, the address or login name that limits hold for, and the page's language."""

    key: str
    address: str
    language: str


@dataclass(frozen=True)
class View:
    """What the page shows next; None: as before."""

    messages: list[dict[str, Any]] | None = None
    status: str | None = ""
    """A line of HTML."""
    running: bool = False
    """Whether an answer is under way, so that the question can be stopped."""
    box: dict[str, Any] | None = None
    """A refused question, which comes back into the question box: what it held when it was sent."""


class Talk:
    """Everything that visitors can do."""

    def __init__(self, assistant: Assistant, limits: Limits, uploads: UploadFolder, examples: list[Example]) -> None:
        self.assistant, self.limits, self.uploads, self.examples = assistant, limits, uploads, examples
        self.engine = Engine()
        self.visitors = Visitors(limits, self.engine)
        self._opener = ThreadPoolExecutor(1)  # one at a time: a large picture takes a gigabyte while it is opened

    # ---- What a visitor does

    def enter(self, who: Who) -> View:
        """Open a page."""
        try:
            self.visitors.enter(who.key)
        except Refusal as refusal:
            return View(status=_error(refusal.say(who.language)))
        return View()

    async def ask(self, who: Who, box: Any, settings: dict[str, Any]) -> AsyncIterator[View]:
        """Ask what the question box holds."""
        text, files, shown = files_of(box)

        async def add(visitor: Visitor) -> list[Asked]:
            if shown and not visitor.conversation:
                raise Refusal("ended")
            self._check_pictures(visitor, len(files))
            return [*visitor.conversation, Asked(text, [await self._picture(file) for file in files])]

        async for view in self._round(who, settings, add, text, files):
            yield view

    async def ask_example(self, who: Who, index: object, settings: dict[str, Any]) -> AsyncIterator[View]:
        """Ask one of the examples."""

        async def add(visitor: Visitor) -> list[Asked]:
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(self.examples):
                raise Refusal("gone")
            example = self.examples[index]
            self._check_pictures(visitor, len(example.pictures))
            pictures = [await self._prepare(image.copy) for image in example.pictures]
            return [*visitor.conversation, Asked(example.question(who.language), pictures)]

        async for view in self._round(who, settings, add):
            yield view

    async def retry(self, who: Who, settings: dict[str, Any]) -> AsyncIterator[View]:
        """Ask the last question again."""

        async def add(visitor: Visitor) -> list[Asked]:
            if not visitor.conversation:
                raise Refusal("gone")
            *earlier, last = visitor.conversation
            return [*earlier, Asked(last.text, last.pictures)]

        async for view in self._round(who, settings, add):
            yield view

    async def edit(self, who: Who, index: object, text: object, settings: dict[str, Any]) -> AsyncIterator[View]:
        """Ask an earlier question in other words; what came after it is dropped."""

        async def add(visitor: Visitor) -> list[Asked]:
            index_of = index[0] if isinstance(index, (list, tuple)) and index else index
            number = question_at(visitor.conversation, index_of)
            if number is None or not isinstance(text, str):
                raise Refusal("gone")
            return [*visitor.conversation[:number], Asked(text, visitor.conversation[number].pictures)]

        async for view in self._round(who, settings, add, text if isinstance(text, str) else None):
            yield view

    def stop(self, who: Who) -> None:
        """End the running answer; what was said of it stays."""
        visitor = self.visitors.find(who.key)
        if visitor is not None:
            visitor.stop()

    def clear(self, who: Who) -> View:
        """Begin a new conversation."""
        visitor = self.visitors.find(who.key)
        if visitor is not None:
            visitor.give_up()
            visitor.conversation = []
            self.engine.forget(who.key)
        return View(messages=[])

    def sweep(self) -> None:
        """Delete uploads that nobody has asked about, and forget who has left; called now and then."""
        self.uploads.sweep()
        self.visitors.sweep()

    # ---- How it is answered

    def _check_text(self, text: str) -> None:
        if not text.strip():
            raise Refusal("nothing_asked")
        if len(text) > self.limits.max_characters:
            raise Refusal("too_long", length=len(text), most=self.limits.max_characters)

    def _check_pictures(self, visitor: Visitor, new: int) -> None:
        if sum(len(asked.pictures) for asked in visitor.conversation) + new > self.limits.max_pictures:
            raise Refusal("too_many_pictures", most=self.limits.max_pictures)
        if len(visitor.conversation) >= MOST_TURNS:
            raise Refusal("too_many_turns", most=MOST_TURNS)

    async def _picture(self, file: dict[str, Any]) -> Picture:
        most = self.limits.max_picture_bytes
        return await self._prepare(self.uploads.load, file.get("path"), file.get("orig_name"), most)

    async def _prepare(self, load: Callable[..., Any], *how: Any) -> Picture:
        def prepare() -> Picture:
            image = load(*how)
            return Picture(thumbnail(image), self.assistant.model.vision_tower.image_transform(image))

        return await asyncio.get_running_loop().run_in_executor(self._opener, prepare)

    async def _round(
        self,
        who: Who,
        settings: dict[str, Any],
        add: Callable[[Visitor], Awaitable[list[Asked]]],
        text: str | None = None,
        files: list[dict[str, Any]] | None = None,
    ) -> AsyncIterator[View]:
        """Answer the last question of the conversation that `add` makes of the old one, unless something is refused.

        Args:
            text: the question, if the visitor wrote it.
            files: what the question box held besides, from which a refused question has come back.
        """
        visitor: Visitor | None = None
        try:
            entered = self.visitors.enter(who.key)
            current = entered.round
            while entered.busy:  # the model may be in the middle of a token that nobody waits for any more
                if not entered.given_up:
                    raise Refusal("busy")
                await asyncio.sleep(_POLL_SECONDS)
            visitor = entered
            visitor.busy, visitor.given_up = True, False
            options = check_settings(settings, self.limits)
            if text is not None:
                self._check_text(text)
            self.visitors.check_rate(visitor, who.address)
            yield View(status=_waiting(say(who.language, "reading")), running=True)
            conversation = await add(visitor)
            prompt, shortened = await asyncio.to_thread(build_prompt, self.assistant, conversation)
            for file in files or []:
                self.uploads.delete(file["path"])
            if visitor.round != current:  # a new conversation has begun meanwhile
                yield View(chat_messages(visitor.conversation, who.language))
                return
            visitor.conversation = conversation
            async for view in self._answer(visitor, who.language, current, prompt, options, shortened):
                yield view
        except Refusal as refusal:
            box, found = None, self.visitors.find(who.key)
            if files is not None:  # those that can be used come back too
                box = {"text": text, "files": [file for file in files if self.uploads.find(file.get("path"))]}
            # Gradio shows an edited question at once; it must not stand over the answer to another one.
            old = None if found is None or files is not None else chat_messages(found.conversation, who.language)
            yield View(old, _error(refusal.say(who.language)), running=refusal.key == "busy", box=box)
        finally:
            if visitor is not None:
                visitor.busy, visitor.seen = False, time.monotonic()

    async def _answer(
        self,
        visitor: Visitor,
        language: str,
        current: int,
        prompt: list[int],
        options: dict[str, Any],
        shortened: bool,
    ) -> AsyncIterator[View]:
        conversation, asked = visitor.conversation, visitor.conversation[-1]
        job = Job(visitor.key, lambda cache: stream_answer(self.assistant, conversation, prompt, options, cache))
        visitor.job = job
        if visitor.given_up:
            job.cancel()
        self.engine.submit(job)
        shown: object = None
        told = None
        try:
            while not job.ended.is_set():
                if job.cancelled:  # the engine passes it over, or ends it once the model lets go of it
                    job.stopped = True
                    break
                ahead = 0 if job.started else self.engine.ahead(job)
                if (job.text, ahead) != shown:
                    shown, asked.answer = (job.text, ahead), job.text
                    status = "" if job.text else say(language, "waiting" if ahead else "reading", ahead=ahead)
                    line = None if status == told else _waiting(status)  # or a refusal would vanish with the next token
                    yield View(chat_messages(conversation, language), line, running=True)
                    told = status
                await asyncio.sleep(_POLL_SECONDS)
        finally:
            job.cancel()
            visitor.job, visitor.given_up = None, True
        if visitor.round != current:  # a new conversation has begun meanwhile
            yield View(chat_messages(visitor.conversation, language))
            return
        asked.answer = job.text
        status = _note(say(language, "shortened")) if shortened else ""
        if job.error is not None:
            status = _error(say(language, explain(job.error)))
        elif job.stopped:
            status = _note(say(language, "stopped"))
        yield View(chat_messages(conversation, language), status)


def explain(error: BaseException) -> str:
    """Log an error of the model; return the key of what a visitor is told."""
    if is_out_of_memory(error):
        logger.error("web_demo.py: out of memory (%s)", in_one_line(error)[:160])
        return "out_of_memory"
    logger.error("web_demo.py: an answer failed", exc_info=error)
    return "failed"


def _waiting(text: str) -> str:
    return f'<div class="waiting" role="status">{html.escape(text)}</div>' if text else ""


def _note(text: str) -> str:
    return f'<div class="note" role="status">{html.escape(text)}</div>'


def _error(text: str) -> str:
    return f'<div class="error" role="alert">{html.escape(text)}</div>'
