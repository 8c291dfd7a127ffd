"""Messages in one line, and memory that has run out under many names."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from typing import NoReturn

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


def one_line(text: str) -> str:
    """Write line breaks, tabs and backslashes as escapes, so that a name or an answer takes one column of one line."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of a GPU or of the machine has run out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # PyTorch's, without loading it
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def out_of_memory(error: BaseException, advice: str) -> str:
    """Return one line: the error without the allocator's own advice, then `advice`."""
    text = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    return f"out of memory ({text[:160] or type(error).__name__}): {advice}"


def exit_status(error: BaseException, logger: logging.Logger, program: str, less_memory: str) -> int:
    """Log an error that the user can do something about in one line; any other is raised again.

    Args:
        error: a program's end.
        logger: the program's own.
        program: its name, which begins the line.
        less_memory: advice for when memory ran out.

    Returns:
        1 if memory ran out, 2 for what the user can fix, 130 after Ctrl-C.
    """
    if isinstance(error, KeyboardInterrupt):
        sys.stderr.write("\n")
        return 130
    if is_out_of_memory(error):
        logger.error("%s: %s", program, out_of_memory(error, less_memory))
        return 1
    if isinstance(error, (ValueError, OSError, ModuleNotFoundError)):
        logger.error("%s: %s", program, in_one_line(error))
        return 2
    raise error
