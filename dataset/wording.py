"""How messages count."""

from __future__ import annotations


def counted(number: int, one: str, many: str = "") -> str:
    """A number and what it counts: `1 sample`, `1,200 samples`.

    `model.console` has the same, for the packages that do not know this one.

    Args:
        number: how many.
        one: the noun for one.
        many: for several; by default with an s.
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"
