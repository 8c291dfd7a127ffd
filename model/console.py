"""The programs' messages: to stderr, one line each, without other packages' chatter. Answers go to stdout."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from typing import NoReturn

import torch

OUR_LOGGERS = ("dataset", "model", "qwen", "test", "train", "visual")
_OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "alloc_failed",
    "bad_alloc",
    "killed by signal: killed",  # a data worker, by the system
)
"""How CUDA, MPS, cuBLAS, PyTorch's CPU allocator, C++ and a killed data worker say it."""


def use_utf8() -> None:
    """Read and write UTF-8 whatever the locale says: answers are Chinese, and must not fail where it is ASCII."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


def set_up_logging(rank: int = 0, world_size: int = 1) -> None:
    """Let our packages log to stderr: everything on the first process, warnings and errors on the others."""
    prefix = "" if world_size == 1 else f"[{rank}] "
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format=f"{prefix}%(message)s", force=True)
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.WARNING)
    # PEFT uses deprecated names of transformers, and accelerate reports a default that it has set.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS", category=UserWarning)


class OneLineErrors(argparse.ArgumentParser):
    """Raises what is wrong with a command line instead of printing a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Report a mistake.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{message}; --help explains the flags")


def in_one_line(error: BaseException) -> str:
    """Return an error's message without line breaks, and without the traceback of a data worker."""
    text = str(error)
    if re.match(r"Caught \w+ in DataLoader worker process", text):
        # PyTorch puts the worker's traceback into the message; its last paragraph names the class and the reason.
        text = re.split(r"\n[\w.]*Error: ", text)[-1]
    return " ".join(text.split())


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of a GPU or of the machine has run out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def out_of_memory(error: BaseException, advice: str) -> str:
    """Return one line: the error without the allocator's own advice, then `advice`."""
    text = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    return f"out of memory ({text[:160] or type(error).__name__}): {advice}"


def one_line(text: str) -> str:
    """Write line breaks, tabs and backslashes as escapes, so that a name or an answer takes one column of one line."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def show(texts: Iterator[str], *, may_be_stopped: bool = False) -> str:
    """Print a growing text as it grows, and a line break at its end; returns what was printed.

    With `may_be_stopped`, Ctrl-C ends the text there, and nothing else.
    """
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
