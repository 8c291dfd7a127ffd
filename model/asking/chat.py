"""The terminal: a chat about images, answers that grow, and one line about an error."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence

from PIL import Image

from qwen import IMAGE_TOKEN
from qwen.chatml import Turn
from qwen.prompt_cache import PromptCache

from ..errors import in_one_line, is_out_of_memory, out_of_memory
from .assistant import Assistant, with_placeholders

logger = logging.getLogger(__name__)


def chat(assistant: Assistant, images: Sequence[Image.Image]) -> None:
    """Answer questions from stdin until its end, `exit` or `quit`; each answer sees the turns before it.

    Ctrl-C stops an answer, and what was said of it stays in the conversation; at the prompt it leaves the chat.
    """
    features = assistant.features(images)
    history: list[Turn] = []
    cache = PromptCache()  # each turn reads its new tokens only
    sys.stderr.write("Ask about the image; `exit` or the end of input leaves.\n")
    while True:
        sys.stderr.write("> " if sys.stdin.isatty() else "")
        sys.stderr.flush()
        line = sys.stdin.readline()
        question = line.strip()
        if not line or question in ("exit", "quit"):
            return
        if not question:
            continue
        try:
            # The first question brings the images. A later one can't bring any, so its placeholders are dropped.
            if history and IMAGE_TOKEN in question:
                logger.warning("%s left out: the images belong to the first question", IMAGE_TOKEN)
            question = question.replace(IMAGE_TOKEN, "") if history else with_placeholders(question, len(images))
            answer = show(assistant.stream(question, features, history, cache), may_be_stopped=True)
        except (ValueError, RuntimeError, MemoryError) as error:
            logger.error("test.py: %s", explain(error))
            continue
        if answer:  # a question that was stopped before the first word of its answer counts as not asked
            history.append((question, answer))


def show(texts: Iterator[str], *, may_be_stopped: bool = False) -> str:
    """Print a growing text as it grows; return what was printed. With `may_be_stopped`, Ctrl-C only ends the text."""
    shown = ""
    try:
        with contextlib.closing(texts):  # type: ignore[type-var]
            for text in texts:
                new, shown = text[len(shown) :], text
                print(new, end="", flush=True)  # noqa: T201
    except BaseException as error:
        if not (may_be_stopped and isinstance(error, KeyboardInterrupt)):
            if shown:
                print(flush=True)  # noqa: T201, whatever comes next begins a line
            raise
        sys.stderr.write(" [stopped]")
        sys.stderr.flush()
    print(flush=True)  # noqa: T201
    return shown


def explain(error: Exception) -> str:
    """Return one line about an error, with advice where memory ran out; raise one that is this program's own again."""
    if is_out_of_memory(error):
        return out_of_memory(
            error,
            "give fewer images and shorter questions, lower --max_new_tokens or --batch_size, load half the bytes with "
            "--dtype bfloat16, or use --device cpu",
        )
    if isinstance(error, (ValueError, OSError)):
        return in_one_line(error)
    raise error
