"""Telling that memory has run out, which every device says in its own words."""

from __future__ import annotations

import torch

_SAID_AS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "alloc_failed",
    "bad_alloc",
    "killed by signal: killed",  # a data worker, by the system
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, of a GPU or the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SAID_AS)


def out_of_memory(error: BaseException, advice: str) -> str:
    """One line: what the error says, without the allocator's advice that follows, and ours."""
    text = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    return f"out of memory ({text[:160] or type(error).__name__}): {advice}"
