"""Counting what came in and what became of it, and the table shown at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from dataprocess.config import Source


@dataclass
class Counts:
    """What became of one source's records."""

    source: Source
    """The source."""
    records: int = 0
    """Elements in its file."""
    samples: int = 0
    """Records that were written."""
    images: set[str] = field(default_factory=set)
    """Distinct names of images in those samples."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Records left out, by reason."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Captions left out of records that were kept, by reason."""


def table(counts: Sequence[Counts]) -> str:
    """Lay out the counts per source, their sum, and the reasons for what was left out.

    An image that several sources share counts once in the sum.
    """
    folders: dict[str, set[str]] = {}
    for one in counts:
        folders.setdefault(one.source.image_path, set()).update(one.images)
    total = (
        "total",
        sum(one.records for one in counts),
        sum(one.samples for one in counts),
        sum(map(len, folders.values())),
        sum(one.rejects.total() for one in counts),
    )
    rows: list[tuple[str, ...]] = [("source", "records", "samples", "images", "rejects")]
    for one in counts:
        numbers = (one.records, one.samples, len(one.images), one.rejects.total())
        rows.append((one.source.name, *(f"{number:,}" for number in numbers)))
    rows.append((total[0], *(f"{number:,}" for number in total[1:])))
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [
        row[0].ljust(first) + "".join("  " + cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))
        for row in rows
    ]
    for one in counts:
        for what, reasons in (("record", one.rejects), ("caption", one.left_out)):
            lines += [
                f"left out of {one.source.name}: {number:,} {what}{'s' * (number > 1)}: {reason}"
                for reason, number in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
            ]
    return "\n".join(lines) + "\n"
