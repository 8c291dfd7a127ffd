"""Values and numbers as messages show them."""

from __future__ import annotations


def format_count(number: int, singular: str, plural: str | None = None) -> str:
    """Format a number with its noun: `1 sample`, `1,200 samples`.

    Args:
        number: how many.
        singular: the noun for one.
        plural: the noun for several; by default `singular` with an s.
    """
    noun = singular if number == 1 else plural or singular + "s"
    return f"{number:,} {noun}"


def shorten(value: object, limit: int = 80) -> str:
    """Format a value in Python's notation, in ASCII and cut to `limit` characters."""
    try:
        text = ascii(value[:limit]) if isinstance(value, str) else ascii(value)
    except RecursionError:
        text = f"{type(value).__name__}, deeply nested"
    return text if len(text) <= limit else text[: limit - 3] + "..."
