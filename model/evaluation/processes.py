"""The processes that torchrun starts, by the environment that it gives them; without torch."""

from __future__ import annotations

import os

from ..console import set_up_logging


def enter_process() -> tuple[int, int]:
    """Set up this process's messages; return its rank and the number of processes.

    Raises:
        ValueError: if RANK or WORLD_SIZE is not a whole number.
    """
    set_up_logging()  # for the refusal
    rank, world_size = _number("RANK", "0"), _number("WORLD_SIZE", "1")
    set_up_logging(rank, world_size)
    return rank, world_size


def _number(name: str, default: str) -> int:
    value = os.environ.get(name, default)
    if not value.isdecimal():
        raise ValueError(f"{name}={value!r} in the environment: expected a whole number, as torchrun sets it; unset it")
    return int(value)
