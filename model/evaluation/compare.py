"""Two sets of answers to the same questions: differences with intervals, and the questions whose score changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataprocess.messages import shorten

from .files import to_json, write_whole
from .intervals import differences
from .items import Item
from .metrics import FAMILIES, Scored, check_families, score
from .results import read_results

_SMALLEST = 1e-9  # of a change


def compare(first: Path, second: Path, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score the answers in two output folders of evaluate.py again, and compare them question by question.

    Returns:
        What compare.json holds; and a line for each question whose score changed.

    Raises:
        ValueError: if the questions or their references differ, or no metric was computed for both.
    """
    items, answers, families = read_results(first)
    others, other_answers, other_families = read_results(second)
    order = {str(item.question.id): at for at, item in enumerate(others)}
    for item in items:
        at = order.get(str(item.question.id))
        if at is None or others[at].references != item.references or len(others) != len(items):
            raise ValueError(
                f"--compare: {first} and {second} are not about the same questions: {shorten(item.question.id, 40)} "
                "is missing, has other references, or one has more questions; evaluate both on the same file"
            )
    other_answers = [other_answers[order[str(item.question.id)]] for item in items]
    common = [family for family in FAMILIES if family in families and family in other_families]
    if not common:
        raise ValueError(f"--compare: no metric of {first} was computed for {second}; evaluate one of them again")
    check_families(items, common)
    pairs = list(zip(score(items, answers, common), score(items, other_answers, common), strict=True))
    changed = [line for pair in pairs for line in _changed(*pair, items, answers, other_answers)]
    result = {
        "first": str(first),
        "second": str(second),
        "questions": len(items),
        "differences": {name: found for pair in pairs for name, found in differences(*pair, seed).items()},
        "better": Counter(line["metric"] for line in changed if line["second"] > line["first"]),
        "worse": Counter(line["metric"] for line in changed if line["second"] < line["first"]),
    }
    return result, changed


def _changed(
    first: Scored,
    second: Scored,
    items: Sequence[Item],
    answers: Sequence[str | None],
    other_answers: Sequence[str | None],
) -> list[dict[str, Any]]:
    lines = []
    for at, before, after in zip(first.rows, first.each, second.each, strict=True):
        if abs(after - before) > _SMALLEST:
            line = {"id": items[at].question.id, "metric": first.main, "first": before, "second": after}
            lines.append({**line, "first_answer": answers[at], "second_answer": other_answers[at]})
    return sorted(lines, key=lambda line: line["second"] - line["first"])


def write_comparison(output: Path, result: dict[str, Any], changed: Sequence[dict[str, Any]]) -> None:
    """Write compare.json and changed.jsonl, questions that became worse first."""
    write_whole(output / "changed.jsonl", "".join(to_json(line) + "\n" for line in changed))
    write_whole(output / "compare.json", to_json(result, indent=2) + "\n")


def comparison_rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the table of a comparison as (header, rows)."""
    head = ["Metric", "First", "Second", "Difference", "95% interval", "Better", "Worse"]
    rows = []
    for name, found in result["differences"].items():
        low, high = found["interval"]
        row = [name, f"{found['first']:.4f}", f"{found['second']:.4f}", f"{found['difference']:+.4f}"]
        counts = [str(result[side].get(name, "")) for side in ("better", "worse")]
        rows.append([*row, f"{low:+.4f} to {high:+.4f}", *counts])
    return head, rows
